"""The arithmetic of benchmarks/train_step.py; what it measures is never asserted."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import peer_step
from peer_step import run_script, script_command
from train_step import alternate, summary

#: What the real script's parser requires to be spelt so (diffusers examples/text_to_image).
FLAGS = {
    "--pretrained_model_name_or_path",
    "--train_data_dir",
    "--output_dir",
    "--max_train_steps",
    "--report_to",
    "--resolution",
    "--train_batch_size",
    "--mixed_precision",
    "--use_ema",
}
STUB = """
import argparse, pathlib
from torch.utils.tensorboard.writer import SummaryWriter
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
given, _ = parser.parse_known_args()
writer = SummaryWriter(str(pathlib.Path(given.output_dir) / "logs" / "text2image-fine-tune"))
for step in range(1, given.max_train_steps + 1):
    writer.add_scalar("train_loss", 0.5, step, walltime=1000.0 + (50.0 if step < 3 else 3.0 * step))
writer.close()
"""


def test_the_median_ratio_has_an_interval_around_it() -> None:
    times = [(2.0 + 0.01 * (n % 5), 1.0) for n in range(20)]
    found = summary(times)
    assert found["ratio"] == pytest.approx(2.02)
    low, high = found["interval"]
    assert 2.0 <= low <= found["ratio"] <= high <= 2.04
    assert found["pairs"] == 20
    assert summary([(1.0, 2.0)] * 20)["ratio"] == 0.5  # theirs / ours: below 1 ours is slower


def test_blocks_alternate_and_each_time_is_booked_to_its_owner() -> None:
    said: list[str] = []

    def theirs() -> None:
        said.append("theirs")
        time.sleep(0.02)

    times = alternate(theirs, lambda: said.append("ours"), 4, torch.device("cpu"))
    assert said == ["theirs", "ours", "ours", "theirs"] * 2
    assert all(peer >= 0.02 for peer, _ in times)  # sleep takes at least that long


def test_the_command_spells_the_script_s_flags() -> None:
    given = {"resolution": 64, "train_batch_size": 2, "mixed_precision": "no"}
    command = script_command(Path("a.py"), Path("m"), Path("d"), Path("o"), 9, **given)
    assert {word for word in command if word.startswith("--")} == FLAGS
    assert command[command.index("--max_train_steps") + 1] == "9"


def test_step_times_come_from_the_script_s_own_record(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    script = tmp_path / "script.py"
    script.write_text(STUB)
    monkeypatch.setattr(peer_step.importlib.util, "find_spec", lambda name: True)
    assert run_script(script, tmp_path, tmp_path, 4) == pytest.approx([3.0] * 4)
    script.write_text("raise SystemExit('no such model')")
    with pytest.raises(SystemExit, match="no such model"):
        run_script(script, tmp_path, tmp_path, 4)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="it is there")
def test_what_the_script_lacks_is_named() -> None:
    with pytest.raises(SystemExit, match="torchvision"):
        run_script(Path("a.py"), Path("m"), Path("d"), 1)
