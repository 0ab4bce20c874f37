import json
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.train import log as tracking
from latentdiff.train.batches import BatchShape, Prefetch
from latentdiff.train.checkpoint import CheckpointError
from latentdiff.train.divergence import MAX_BAD_STEPS
from latentdiff.train.log import Tracker, forget_after, read_metrics
from latentdiff.train.loop import LoopConfig, OptimizerStep, Step, clock, training_loop
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer


class Run:
    """A linear model that learns y = x, driven by the loop."""

    def __init__(self, folder: Path, accumulation: int = 1, **loop: object) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.config = LoopConfig(
            gradient_accumulation=accumulation,
            tensorboard=False,
            log_every=4,
            **loop,  # type: ignore[arg-type]
        )
        self.shape = BatchShape(8 // accumulation, accumulation)
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        optimizer = make_optimizer(self.net, OptimizerConfig())
        model, prepared = self.accelerator.prepare(self.net, optimizer)
        self.optimizer_step = OptimizerStep(
            self.accelerator, model, prepared, lambda step: 1e-2, 1.0, accumulation
        )
        self.tracker = Tracker(folder, 0, self.config, True)
        self.saved: list[int] = []
        self.fails_at: set[int] = set()

    def save(self, step: int, seconds: float) -> None:
        if step in self.fails_at:
            raise CheckpointError("the disk is full.")
        self.saved.append(step)

    def batch(self, step: int, micro: int) -> Tensor:
        samples = self.shape.samples(step, micro)
        rows = [torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in samples]
        return torch.stack(rows)

    def steps(self, **more: Any) -> Iterator[tuple[Step, Tensor]]:
        return training_loop(
            self.optimizer_step,
            self.batch,
            self.shape,
            self.config,
            self.tracker,
            self.save,
            **more,
        )

    def __call__(
        self,
        spoil: Callable[[int], bool] = lambda step: False,
        after_step: Callable[[int], None] = lambda done: None,
    ) -> None:
        for step, x in self.steps(after_step=after_step):
            loss = (self.net(x) - x).square().mean()
            step.backward(loss * torch.nan if spoil(step.number) else loss)
            step.update()


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole = Run(tmp_path / "a", max_steps=60)
    parts = Run(tmp_path / "b", accumulation=4, max_steps=60)
    for run in (whole, parts):
        run.tracker._path.parent.mkdir()
        run()
    torch.testing.assert_close(whole.net.weight, parts.net.weight)
    ours, theirs = (read_metrics(tmp_path / n / "metrics.jsonl") for n in "ab")
    assert [r["step"] for r in ours] == list(range(1, 61))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs])
    assert ours[-1]["loss"] < ours[0]["loss"] / 2


def test_the_first_step_is_logged_at_once_and_then_every_log_every(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, max_steps=10)
    shown: list[tuple[int, dict[str, str]]] = []
    written: list[list[int]] = []
    progress, write = run.tracker.progress, run.tracker.write
    run.tracker.progress = lambda n, words: (shown.append((n, words)), progress(n, words))  # type: ignore
    run.tracker.write = lambda rows: (written.append([r["step"] for r in rows]), write(rows))  # type: ignore
    run()
    assert written == [[1], [2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert [step for step, _ in shown] == [1, 4, 8, 10]
    # The bar itself may hold later steps back, but not the first.
    assert "1/10 [" in (err := capsys.readouterr().err) and shown[0][1]["loss"] in err
    rows = read_metrics(tmp_path / "metrics.jsonl")
    # The first step compiles and warms up: it is in no reported speed.
    assert [r["step"] for r in rows if "images_per_second" in r] == [4, 8, 10]
    assert set(shown[0][1]) == {"loss"} and "images/s" in shown[1][1]


def test_after_ten_steps_it_says_how_long_the_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = [1000.0], list[str]()
    monkeypatch.setattr("latentdiff.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr("latentdiff.train.loop.clock", lambda seconds: f"in {seconds:.0f} s")
    run = Run(tmp_path, max_steps=100)
    run.tracker.say = said.append  # type: ignore[method-assign]
    for step, x in run.steps(first_step=5):
        now[0] += 60.0 if step.number == 5 else 2.0
        step.backward((run.net(x) - x).square().mean())
        step.update()
    assert len(said) == 1
    assert said[0].startswith("2 s a step and ") and said[0].endswith(
        "the 84 steps left take about 02:48, until in 168 s"
    )


def test_the_time_of_day_has_a_date_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    noon = datetime(2026, 3, 4, 12, 0).timestamp()
    monkeypatch.setattr("latentdiff.train.loop.time.time", lambda: noon)
    assert (clock(5400), clock(86400)) == ("13:30", "05 March 12:00")


def test_a_resumed_run_logs_its_own_first_step_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=9)
    for step, x in run.steps(first_step=5):
        step.backward((run.net(x) - x).square().mean())
        step.update()
        if step.number == 6:
            rows = read_metrics(tmp_path / "metrics.jsonl")
            assert [row["step"] for row in rows] == [6]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [6, 7, 8, 9]


def test_checkpoints_come_on_time_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=10, checkpoint_every=4)
    run()
    assert run.saved == [4, 8, 10]


def test_it_stops_after_the_given_minutes_with_a_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=10**9, max_minutes=0.5 / 60)
    started = time.monotonic()
    run()
    assert time.monotonic() - started < 20
    assert len(run.saved) == 1


def test_more_numbers_are_means_over_the_micro_batches(tmp_path: Path) -> None:
    run = Run(tmp_path, accumulation=2, max_steps=6)
    values = []
    for step, x in run.steps():
        loss = (run.net(x) - x).square().mean()
        step.backward(loss)
        step.log(size=x.abs().mean(), **({"late": loss} if step.number >= 5 else {}))
        values.append(float(x.abs().mean()))
        step.update()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    wanted = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]
    assert [row["size"] for row in rows] == pytest.approx(wanted, abs=0)
    assert rows[5]["late"] == pytest.approx(rows[5]["loss"]) and "late" not in rows[4]


@pytest.mark.parametrize("own_loss", [True, False])
def test_another_model_in_the_same_steps_is_logged_and_its_bad_steps_count(
    tmp_path: Path, own_loss: bool
) -> None:
    run = Run(tmp_path, max_steps=100)
    second = nn.Linear(4, 4)
    optimizer = run.accelerator.prepare(make_optimizer(second, OptimizerConfig()))
    other = OptimizerStep(run.accelerator, second, optimizer, lambda step: 1e-2, 1.0, 1)
    before = {}
    with pytest.raises(UserError, match="not finite in the last"):
        for step, x in run.steps(others={"second": other}):
            loss, more = ((net(x) - x).square().mean() for net in (run.net, second))
            more = more * torch.inf if step.number >= 2 else more
            step.backward(loss if own_loss else loss + more)
            step.update()
            if own_loss:
                other.backward(more)
            other.update(step.number)
            before.setdefault(step.number, second.weight.detach().clone())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[1]["second_grad_norm"] > 0 and rows[2]["second_grad_norm"] is None
    assert ("second_loss" in rows[1]) == own_loss
    assert rows[2]["loss"] is not None or not own_loss
    assert not torch.equal(before[0], before[1]) and torch.equal(before[1], second.weight)
    assert MAX_BAD_STEPS <= len(rows) - 2 < MAX_BAD_STEPS + 4


def test_a_gradient_scaler_changes_no_gradient_also_where_two_models_have_one_loss(
    tmp_path: Path,
) -> None:
    rows = []
    for scaled in (False, True):
        folder = tmp_path / str(scaled)
        folder.mkdir()
        run = Run(folder, max_steps=6)
        torch.manual_seed(1)
        second = nn.Linear(4, 4)
        optimizer = run.accelerator.prepare(make_optimizer(second, OptimizerConfig()))
        other = OptimizerStep(run.accelerator, second, optimizer, lambda step: 1e-2, 1.0, 1)
        if scaled:
            scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=2)
            run.accelerator.scaler = scaler
        for step, x in run.steps(others={"second": other}):
            first, more = ((net(x) - x).square().mean() for net in (run.net, second))
            step.backward(first + more)
            step.update()
            other.update(step.number)
        rows.append(read_metrics(folder / "metrics.jsonl"))
    assert scaler.get_scale() == 2.0**13  # it grew, once every two steps
    norms = [[(r["grad_norm"], r["second_grad_norm"]) for r in found] for found in rows]
    assert norms[0] == norms[1]


def test_a_bad_step_changes_nothing_and_many_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=200)
    with pytest.raises(UserError, match=r"not finite in the last 2\d steps") as error:
        run(spoil=lambda step: step == 3 or step >= 30)
    assert "optimizer.lr" in str(error.value)
    assert bool(torch.isfinite(run.net.weight).all())
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["loss"] is None][:2] == [4, 31]
    assert len(rows) < 30 + MAX_BAD_STEPS + 8


def test_metrics_of_steps_that_will_be_made_again_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"step": n, "loss": n}) + "\n" for n in range(1, 6)) + '{"step": 6, "l'
    )
    forget_after(file, 5)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3, 4, 5]
    assert file.read_text().endswith('"step": 5, "loss": 5}\n')
    with open(file, "a") as more:  # the validation after the checkpoint is made again
        more.write('{"step": 5, "validation_loss": 1}\n{"step": 6, "loss": 1}\n')
    forget_after(file, 5)
    assert [list(row) for row in read_metrics(file)] == [["step", "loss"]] * 5
    forget_after(file, 3)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]


def test_metrics_with_lines_that_a_crash_has_cut_can_be_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [{"step": n, "loss": n / 3} for n in (1, 2, 5)]
    first, second, last = map(json.dumps, good)
    file.write_text("\n".join([first, '{"step": 2, "lo' + second, second, "", "[]", "7", last, ""]))
    assert read_metrics(file) == good
    forget_after(file, 2)
    assert file.read_text() == f"{first}\n{second}\n"


def test_prefetch_keeps_the_order_and_passes_errors_on() -> None:
    def make(step: int, micro: int) -> int:
        if step == 3:
            raise UserError("no more")
        return 10 * step + micro

    keys = ((s, m) for s in range(5) for m in range(2))
    found = []
    with pytest.raises(UserError, match="no more"):
        for step, micro, batch in Prefetch(make, keys):
            assert batch == 10 * step + micro
            found.append(batch)
    assert found == [0, 1, 10, 11, 20, 21]


def test_a_full_disk_does_not_end_the_run_but_the_last_checkpoint_must_be(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=10, checkpoint_every=4)
    said: list[str] = []
    run.tracker.say = said.append  # type: ignore[method-assign]
    run.fails_at = {4}
    run()
    assert run.saved == [8, 10]
    assert len(said) == 1
    assert "disk is full" in said[0]
    run = Run(tmp_path, max_steps=10, checkpoint_every=4)
    run.fails_at = {10}
    with pytest.raises(CheckpointError, match="disk is full"):
        run()


def test_metrics_that_a_full_disk_refuses_come_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, max_steps=10)
    said, room = [], [False]
    run.tracker.say = said.append  # type: ignore[method-assign]

    class Half:
        """A file that takes half of a text."""

        def __init__(self, *given: Any, **options: Any) -> None:
            self.file = open(*given, **options)  # noqa: SIM115

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text if room[0] else text[: len(text) // 2])
            if not room[0]:
                raise OSError(28, "No space left on device")

    def after_step(done: int) -> None:
        if done < 8:
            assert (tmp_path / "metrics.jsonl").read_bytes() == b""
        room[0] = done >= 8

    monkeypatch.setattr(tracking, "open", Half, raising=False)
    run(after_step=after_step)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    assert all("metrics.jsonl" in text and "No space left" in text for text in said)
    assert len(said) == 3  # after steps 1, 4 and 8


def test_the_model_is_looked_at_when_its_checkpoint_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=10, checkpoint_every=4)

    def after_step(done: int) -> None:
        if done == 8:
            raise UserError("no memory for images")

    with pytest.raises(UserError, match="no memory"):
        run(after_step=after_step)
    assert run.saved == [4, 8]


@pytest.mark.parametrize(
    ("every", "words"),
    [(0, "at least 1"), (-10, "at least 1"), (7, "a multiple of checkpoint_every=500, or null")],
)
def test_kept_checkpoints_must_be_among_the_written_ones(every: int, words: str) -> None:
    with pytest.raises(UserError, match=f"keep_every:? must be {words}"):
        load_config(LoopConfig, overrides=[f"keep_every={every}"])
    assert load_config(LoopConfig, overrides=["keep_every=1000"]).keep_every == 1000
