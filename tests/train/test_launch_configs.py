"""Every shipped launch configuration is parsed and dry-run: all but the training itself."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from latentdiff.errors import UserError
from latentdiff.train.distributed import fsdp_plugin, start_processes
from latentdiff.train.rendezvous import was_restarted

FOLDER = Path(__file__).parents[2] / "training" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def dry_run(file: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Any, dict]:
    """What `accelerate launch` would start: torchrun's arguments and the environment."""
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser

    seen: list[tuple[Any, dict[str, str]]] = []

    class Started:
        """In place of the process of a launch without torchrun."""

        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append((command, env))

        def wait(self) -> None:
            """End at once."""

    monkeypatch.setattr(
        "torch.distributed.run.run", lambda arguments: seen.append((arguments, dict(os.environ)))
    )
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    given = ["--config_file", str(file), *options, "training/train_latent.py"]
    launch_command(launch_command_parser().parse_args(given))
    return seen[0]


def options_of(file: Path) -> list[str]:
    """The options after --config_file in the command that the file's head gives."""
    head = " ".join(line[1:] for line in file.read_text().splitlines() if line.startswith("#"))
    found = re.search(r"accelerate launch --config_file \S+ (.*?)training/train_latent", head)
    text = found[1].replace("\\", " ") if found else ""
    values = {"N": "1", "ADDRESS_OF_MACHINE_0": "10.0.0.1"}
    return [values.get(word, word) for word in shlex.split(text)]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_it_parses_and_says_whether_it_has_been_run(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert config.mixed_precision in (None, "no")  # loop.mixed_precision alone decides
    text = file.read_text()
    assert ("Not yet run" in text) == (file.stem not in ("single", "ddp_cpu_2", "fsdp2_cpu_2"))


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "single"], ids=lambda p: p.stem)
def test_it_starts_the_processes_it_speaks_of(file: Path, monkeypatch) -> None:
    options = options_of(file)
    if file.stem in ("ddp", "fsdp2_full_shard"):
        options = ["--num_processes", "3"]
    arguments, environment = dry_run(file, monkeypatch, *options)
    several = file.stem in ("ddp_multi_node", "fsdp2_hybrid")
    expected = {"ddp": "3", "fsdp2_full_shard": "3", "ddp_cpu_2": "2", "fsdp2_cpu_2": "2"}
    assert arguments.nproc_per_node == expected.get(file.stem, "8")
    assert arguments.training_script == "training/train_latent.py"
    if several:
        assert (arguments.nnodes, arguments.node_rank) == ("2", 1)
        assert (arguments.rdzv_backend, arguments.max_restarts) == ("c10d", 3)
        assert arguments.rdzv_endpoint == "10.0.0.1:29500"
    wants = environment.get("ACCELERATE_USE_FSDP", "false") == "true"
    assert wants == file.stem.startswith("fsdp2")


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.stem.startswith("fsdp2")], ids=lambda path: path.stem
)
def test_it_shards_as_it_says(file: Path, monkeypatch) -> None:
    _, environment = dry_run(file, monkeypatch, *options_of(file))
    for name in ("FSDP_", "PARALLELISM_", "ACCELERATE_USE_P"):
        for key in [key for key in environment if key.startswith(name)]:
            monkeypatch.setenv(key, environment[key])
    plugin = fsdp_plugin("bf16")
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is (file.stem != "fsdp2_shard_grad_op")
    policy = plugin.mixed_precision_policy
    assert (str(policy.param_dtype), str(policy.reduce_dtype)) == (
        "torch.bfloat16",
        "torch.float32",
    )
    if file.stem == "fsdp2_hybrid":
        from accelerate import ParallelismConfig

        assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
        mesh = ParallelismConfig()
        assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)


def test_single_is_a_plain_start(monkeypatch) -> None:
    command, environment = dry_run(FOLDER / "single.yaml", monkeypatch)
    assert command[-1] == "training/train_latent.py"
    assert environment.get("ACCELERATE_USE_FSDP", "false") == "false"


@pytest.mark.parametrize(("version", "precision"), [("1", "bf16"), ("2", "fp16")])
def test_what_sharding_cannot_do_is_refused(monkeypatch, version: str, precision: str) -> None:
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(UserError, match="sharding works with"):
        fsdp_plugin(precision)


@pytest.mark.parametrize(
    ("name", "value", "shards", "text"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", False, "trains copies"),
        ("ACCELERATE_USE_DEEPSPEED", "true", True, "accelerate/fsdp2_shard_grad_op.yaml"),
        ("ACCELERATE_USE_FSDP", "true", False, "trains copies"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", True, "loop.gradient_accumulation=4"),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(
    monkeypatch, name, value, shards, text
) -> None:
    from accelerate.state import GradientState

    monkeypatch.setenv(name, value)
    try:
        with pytest.raises(UserError, match=text):
            start_processes("no", cpu=True, shards=shards)
    finally:
        GradientState._reset_state()


def test_the_launcher_says_when_it_starts_a_run_again(monkeypatch) -> None:
    assert not was_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not was_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert was_restarted()
