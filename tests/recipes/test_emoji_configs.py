"""The YAML files of recipes/emoji are configurations of their scripts."""

from pathlib import Path

import pytest

from latentdiff.config import flat, load_config, to_dict
from latentdiff.plain_yaml import read_yaml
from latentdiff.train.autoencoder import AutoencoderTrainConfig
from latentdiff.train.clip import ClipTrainConfig
from latentdiff.train.config import TrainConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("autoencoder", AutoencoderTrainConfig),
        ("text_encoder", ClipTrainConfig),
        ("unet", TrainConfig),
    ],
)
def test_configurations_load(stage, kind):
    given = flat(read_yaml(RECIPE / f"{stage}.yaml"))
    config = flat(to_dict(load_config(kind, RECIPE / f"{stage}.yaml", [])))
    assert {key: config[key] for key in given} == given
