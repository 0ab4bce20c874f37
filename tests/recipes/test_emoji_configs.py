"""The YAML files of recipes/emoji are configurations of their scripts."""

from pathlib import Path

import pytest

from latentdiff.config import load_config, to_dict
from latentdiff.plain_yaml import read_yaml
from latentdiff.train.autoencoder import AutoencoderTrainConfig
from latentdiff.train.clip import ClipTrainConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"


@pytest.mark.parametrize(
    ("stage", "kind"), (("autoencoder", AutoencoderTrainConfig), ("text_encoder", ClipTrainConfig))
)
def test_configurations_load(stage, kind):
    given = read_yaml(RECIPE / f"{stage}.yaml")
    config = to_dict(load_config(kind, RECIPE / f"{stage}.yaml", []))
    for section, values in given.items():
        if isinstance(values, dict):
            assert {key: config[section][key] for key in values} == values
        else:
            assert config[section] == values
