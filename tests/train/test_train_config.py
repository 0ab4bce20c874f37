from pathlib import Path

import pytest
from random_models import make_pipeline

from latentdiff.config import load_config
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.formats.folder import load_components
from latentdiff.formats.model import save_model
from latentdiff.train.autoencoder import AutoencoderTrainConfig
from latentdiff.train.checkpoint import _compare
from latentdiff.train.clip import ClipTrainConfig
from latentdiff.train.config import TrainConfig, adopt, deciding_facts, default_facts, read_config
from latentdiff.train.parts import frozen_autoencoder, load_parts

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
OTHERS = {"autoencoder": AutoencoderTrainConfig, "clip": ClipTrainConfig}
FILES = [p for p in sorted(CONFIGS.glob("*.yaml")) if not p.stem.startswith(tuple(OTHERS))]
REST = sorted(set(CONFIGS.glob("*.yaml")) - set(FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    read_config(path, [])


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - set(FILES)), ids=lambda p: p.stem
)
def test_shipped_configurations_of_the_other_scripts_are_valid(path: Path) -> None:
    load_config(OTHERS[path.stem.partition("_")[0]], path)


def test_from_scratch_spells_out_the_defaults() -> None:
    assert read_config(CONFIGS / "from_scratch.yaml", []).config == TrainConfig()


def test_a_pretrained_model_decides_what_is_not_given(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: {pretrained: x}\nschedule: {beta_end: 0.02}\n")
    folder = ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.012)
    config, notes = adopt(read_config(file, ["objective.prediction=x0"]), folder, "eps")
    assert config.schedule == ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02)
    assert config.objective.prediction == "x0"
    assert len(notes) == 2
    assert "schedule.beta_end is 0.02 as given; the pretrained model has 0.012" in notes[0]
    assert adopt(read_config(None, []), folder, "eps")[0].objective.prediction == "eps"


def test_what_a_resumed_run_may_change() -> None:
    def facts(*overrides: str) -> dict:
        return deciding_facts(read_config(None, overrides).config)

    cadence = ("loop.max_steps=7", "output=x", "validation.every=3", "loop.batch_size=1")
    for free in (*cadence, "data.quarantine=x", "data.follow_links=true", "data.path=x"):
        assert facts(free) == facts(), free
    for fixed in ("optimizer.lr=1", "loop.seed=1", "schedule.kind=cosine", "data.image_size=32"):
        assert facts(fixed) != facts(), fixed
    assert facts("optimizer.decay=cosine", "loop.max_steps=7") != facts("optimizer.decay=cosine")


def test_saved_configurations_with_removed_keys_resume_where_those_were_off(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "reading: {weight: 0.0, grid: 4, attentions: []}\nheld: {attentions: [], heads: 1}\n"
    )
    assert deciding_facts(read_config(file, []).config) == deciding_facts(TrainConfig())
    file.write_text("reading: {weight: 0.1, grid: 4}\nheld: {attentions: [mid_block], heads: 2}\n")
    with pytest.raises(UserError) as refused:
        read_config(file, [])
    lines = str(refused.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["reading", "held"]
    assert all("removed" in line and "environment.json" in line for line in lines[1:])


def test_checkpoints_with_removed_options_resume_where_those_were_off() -> None:
    now, defaults = deciding_facts(TrainConfig()), default_facts(TrainConfig())
    off = {"data.emoji_variants": 12, "data.emoji_flags": True, "data.emoji_concepts": []}
    _compare(now | off, now, defaults, Path("x"))
    with pytest.raises(UserError, match=r"data\.emoji_variants: 3 then, 12 now"):
        _compare(now | off | {"data.emoji_variants": 3}, now, defaults, Path("x"))
    assert default_facts(ClipTrainConfig())["same_look"] is False


def test_an_objective_without_a_finite_weight_is_refused_before_anything_is_opened() -> None:
    overrides = ["schedule.kind=flow", "schedule.zero_terminal_snr=false"]
    overrides += ["objective.prediction=x0", "objective.weighting=debiased", "model.vae=nowhere"]
    with pytest.raises(UserError, match="weighting 'debiased' cannot be used with prediction 'x0'"):
        load_parts(read_config(None, overrides))


@pytest.mark.parametrize(
    ("given", "least"),
    [
        ("validation.guidance=-1", 0),
        ("validation.steps=0", 1),
        ("validation.samples=0", 1),
        ("validation.images=-1", 0),
        ("validation.every=-1", 0),
        ("latents.batch_size=0", 1),
        ("latents.context_megabytes=-1", 0),
    ],
)
def test_what_is_out_of_range_is_refused(given: str, least: int) -> None:
    key, _, value = given.partition("=")
    with pytest.raises(UserError, match=rf"{key}: must be at least {least}; got {value}"):
        read_config(None, [given])


@pytest.mark.parametrize("given", ["nan", "inf"])
def test_validation_guidance_must_be_finite(given: str) -> None:
    with pytest.raises(
        UserError, match=rf"validation\.guidance: must be a finite number; got {given}"
    ):
        load_config(TrainConfig, None, [f"validation.guidance=.{given}"])


@pytest.mark.parametrize(
    ("given", "pixels", "sample"), [([], 16, 8), (["data.image_size=32"], 32, 16)]
)
@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_a_fine_tune_keeps_the_image_size_unless_told(
    name, given, pixels, sample, tmp_path
) -> None:
    make_pipeline(sample_size=8).save_pretrained(tmp_path / "model")
    save_model(tmp_path / "model.safetensors", load_components(tmp_path / "model"))
    wanted = read_config(None, [f"model.pretrained={tmp_path / name}", *given])
    parts, config, _ = load_parts(wanted)
    assert config.data.image_size == pixels
    assert parts.unet.config_dict()["sample_size"] == sample
    assert frozen_autoencoder(wanted)[1].data == config.data  # what cache_latents.py takes


def test_frozen_parts_out_of_a_single_file(tmp_path) -> None:
    make_pipeline().save_pretrained(tmp_path / "model")
    save_model(tmp_path / "m.safetensors", load_components(tmp_path / "model"))
    keys = ("model.vae", "model.text_encoder")
    overrides = [f"{key}={tmp_path / 'm.safetensors'}" for key in keys]
    parts = load_parts(read_config(None, [*overrides, "data.image_size=32"]))[0]
    assert (parts.autoencoder.scale, parts.text_encoder.width) == (0.5, 24)
