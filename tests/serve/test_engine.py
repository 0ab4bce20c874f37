"""The queue: whose turn it is, what is made together, and what ends it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentdiff.errors import UserError, warn
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.task import PipelineOutput
from latentdiff.pipelines.task import Progress as PassProgress
from latentdiff.serve.engine import Cancelled, Engine, Full, Job, Made, Order, Stopping
from latentdiff.serve.models import EMBEDDED, Models
from latentdiff.serve.settings import Settings
from tests.random_models import make_pipeline

STEPS = 3


class Painter:
    """A pipeline that paints nothing: what it is asked is the record of a test."""

    default_guidance = 5.0

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.at_work, self.stopped = threading.Event(), threading.Event()
        self._interrupt = False

    def text_to_image(
        self,
        prompt: Sequence[str],
        seed: Sequence[int],
        on_progress: Callable[[PassProgress], None],
        **options: Any,
    ) -> PipelineOutput:
        self.batches.append(list(prompt))
        self._interrupt = False
        if "bad" in prompt:
            raise UserError("bad is no prompt.")
        if "stop" in prompt:
            self.may_go.clear()
            self.stopped.set()
        if "odd" in prompt:
            warn("odd is cut.", "odd")
        if options.get("size") == "large":
            warn("it is large.")
        here = list(range(len(prompt)))
        for step in range(STEPS):
            self.at_work.set()
            assert self.may_go.wait(20)
            none: Any = None
            show = lambda _: [Image.new("L", (1, 1))] * len(here)  # noqa: E731
            on_progress(PassProgress(step + 1, STEPS, 0.0, here, none, none, show))
            if self._interrupt:
                break
        images = [Image.new("L", (1, 1), one % 256) for one in seed]
        settings = [{"prompt": p, "seed": s} for p, s in zip(prompt, seed, strict=True)]
        return PipelineOutput(images, list(seed), settings=settings)

    inpaint = text_to_image


class OneModel:
    """`Models` of a painter."""

    lora_dir = None

    def __init__(self) -> None:
        self.painter, self.unloaded = Painter(), threading.Event()

    @contextmanager
    def use(self, model: str | None, vae: str | None) -> Iterator[Any]:
        yield self.painter

    def unload(self) -> None:
        self.unloaded.set()


@pytest.fixture
def models() -> OneModel:
    return OneModel()


@contextmanager
def started(models: Any, **options: Any) -> Iterator[Engine]:
    engine = Engine(models, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0)


def orders(*prompts: str, **more: Any) -> list[Order]:
    return [Order(prompt, seed, **more) for seed, prompt in enumerate(prompts)]


def result(job: Job) -> list[Made]:
    return asyncio.run(asyncio.wait_for(job.result(), 60))


def waiting(engine: Engine, painter: Painter, *first: str) -> Job:
    """Let a job be in work and stand still, so that others queue up behind it."""
    painter.may_go.clear()
    painter.at_work.clear()
    job = engine.submit("first", orders(*(first or ("first",)), arguments={"size": 1}))
    assert painter.at_work.wait(20)
    return job


def test_turns_go_round_between_clients(models: OneModel) -> None:
    with started(models, batch_size=2) as engine:
        waiting(engine, models.painter)
        jobs = [
            engine.submit("a", orders("a0", "a1", "a2")),
            engine.submit("a", orders("a3")),
            engine.submit("b", orders("b0", "b1")),
            engine.submit("c", orders("c0")),
        ]
        places = [job.progress.ahead for job in jobs]
        models.painter.may_go.set()
        images = [result(job) for job in jobs]
    assert models.painter.batches[1:] == [["a0", "b0"], ["c0", "a1"], ["b1", "a2"], ["a3"]]
    # One is being made; before a's second job come three of its own and three of the others.
    assert places == [1, 7, 2, 3]
    assert [[one.settings["prompt"] for one in made] for made in images] == [
        ["a0", "a1", "a2"], ["a3"], ["b0", "b1"], ["c0"],
    ]  # fmt: skip


def test_only_what_is_alike_is_made_together(models: OneModel) -> None:
    image = {"image": object()}
    with started(models) as engine:
        waiting(engine, models.painter)
        asked = [
            orders("a", arguments={"width": 8, "sampler": "ddim"}),
            orders("b", arguments={"sampler": "ddim", "width": 8}),
            orders("c", arguments={"width": 16}),
            orders("d", arguments={"width": 8, "sampler": "ddim"}, model="other"),
            orders("e", arguments={"width": 8, "sampler": "ddim"}, guidance_scale=3),
            orders("f", "g", arguments=image, task="inpaint"),
            orders("h", arguments={"image": object()}, task="inpaint"),
        ]
        jobs = [engine.submit(str(k), one) for k, one in enumerate(asked)]
        models.painter.may_go.set()
        for job in jobs:
            result(job)
    batches = models.painter.batches[1:]
    assert sorted(batches) == [["a", "b", "e"], ["c"], ["d"], ["f", "g"], ["h"]]


def test_the_queue_is_bounded(models: OneModel) -> None:
    with started(models, max_waiting=4) as engine:
        waiting(engine, models.painter)
        with pytest.raises(UserError, match="1 to 4 images; got 5"):
            engine.submit("a", orders(*"abcde"))
        with pytest.raises(UserError, match="got 0"):
            engine.submit("a", [])
        jobs = [engine.submit("a", orders(*"abc"))]
        with pytest.raises(Full) as full:
            engine.submit("b", orders("d", "e"))
        assert full.value.seconds >= 1
        jobs.append(engine.submit("b", orders("d")))
        jobs[0].cancel()
        jobs.append(engine.submit("b", orders("e", "f")))  # what was cancelled makes room
        models.painter.may_go.set()
        assert [len(result(job)) for job in jobs[1:]] == [1, 2]
    assert models.painter.batches[1:] == [["d", "e", "f"]]


def test_a_fault_of_one_does_not_fail_the_others(models: OneModel) -> None:
    with started(models) as engine:
        waiting(engine, models.painter)
        jobs = [engine.submit(name, orders(name)) for name in ("good", "bad", "odd")]
        models.painter.may_go.set()
        assert result(jobs[0])[0].settings["prompt"] == "good"
        with pytest.raises(UserError, match="bad is no prompt"):
            result(jobs[1])
        assert result(jobs[2])[0].settings["prompt"] == "odd"
    assert (jobs[0].notes, jobs[2].notes) == ([], ["odd is cut."])


def test_a_warning_about_a_prompt_is_told_who_gave_it(models: OneModel) -> None:
    shared = {"size": "large"}
    with started(models) as engine:
        waiting(engine, models.painter)
        asked = [
            orders("odd", "even", arguments=shared),
            orders("even", arguments=shared),
            [Order("even", 0, negative_prompt="odd", arguments=shared)],
            orders("<lora:x:1> odd", arguments=shared),
        ]
        jobs = [engine.submit(str(k), one) for k, one in enumerate(asked)]
        models.painter.may_go.set()
        for job in jobs:
            result(job)
    assert len(models.painter.batches) == 2  # they were made together
    about, of_all = "odd is cut.", "it is large."
    assert [job.notes for job in jobs] == [
        [of_all, about], [of_all], [of_all, about], [of_all, about],
    ]  # fmt: skip


def test_an_interrupted_job_does_not_wait_for_others(models: OneModel) -> None:
    with started(models) as engine:
        waiting(engine, models.painter)
        mine, others = engine.submit("a", orders("1")), engine.submit("b", orders("stop"))
        models.painter.may_go.set()
        assert models.painter.stopped.wait(20)
        engine.interrupt("a")
        assert result(mine) == []
        models.painter.may_go.set()
        assert len(result(others)) == 1


def test_cancelled_and_interrupted(models: OneModel) -> None:
    """An interrupted job gives what there is; the other clients' are made as if it had not been."""
    with started(models, batch_size=2) as engine:
        first = waiting(engine, models.painter, "0", "1", "2")
        mine, others = engine.submit("first", orders("3")), engine.submit("b", orders("4"))
        engine.interrupt("first")
        assert result(mine) == []  # it was not begun
        gone = engine.submit("c", orders("5"))
        gone.cancel()
        with pytest.raises(Cancelled):
            result(gone)
        models.painter.may_go.set()
        assert [one.settings["prompt"] for one in result(first)] == ["0", "1"]
        assert [one.settings["prompt"] for one in result(others)] == ["4"]
        assert (engine.waiting, engine.running) == (0, [])
    assert models.painter.batches == [["0", "1"], ["4"]]


def test_a_stop_finishes_what_is_being_made(models: OneModel) -> None:
    with started(models) as engine:
        running, queued = waiting(engine, models.painter), engine.submit("b", orders("b"))
        engine.stop(20)
        with pytest.raises(Stopping):
            engine.submit("c", orders("c"))
        with pytest.raises(Stopping):
            result(queued)
        models.painter.may_go.set()
        assert len(result(running)) == 1
    assert models.painter.batches == [["first"]]


def test_a_stop_within_a_job_is_no_result_of_it(models: OneModel) -> None:
    with started(models, batch_size=1) as engine:
        job = waiting(engine, models.painter, "0", "1")
        engine.stop(20)
        models.painter.may_go.set()
        with pytest.raises(Stopping):
            result(job)


def test_a_stop_does_not_wait_for_ever(models: OneModel) -> None:
    with started(models) as engine:
        running = waiting(engine, models.painter)
        engine.stop(0)
        with pytest.raises(Stopping):
            result(running)
        models.painter.may_go.set()


def test_progress_is_that_of_the_whole_job(models: OneModel) -> None:
    async def watch(engine: Engine) -> list[tuple[int, int, int, float, int]]:
        job = engine.submit("a", orders("a", "b"), previews=True)
        seen = []
        models.painter.may_go.clear()
        async for at in job.events():
            seen.append((at.made, at.of, at.step, at.share, len(at.previews)))
            models.painter.may_go.set()
        return seen

    with started(models, batch_size=1) as engine:
        seen = asyncio.run(watch(engine))
    shares = [one[3] for one in seen]
    assert shares == sorted(shares) and shares[-1] <= 1
    steps = {(made, step): (share, shown) for made, _, step, share, shown in seen if step}
    for (made, step), (share, shown) in steps.items():
        assert share == pytest.approx((made + step / STEPS) / 2) and shown == 1
    assert {one[1] for one in seen} == {2}


def test_an_idle_server_frees_its_memory(models: OneModel) -> None:
    with started(models, idle=0.01) as engine:
        assert models.unloaded.wait(20)
        assert len(result(engine.submit("a", orders("a")))) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, width in (("one", 0.05), ("two", 0.2)):
        pipe = make_pipeline()
        for weight in pipe.unet.parameters():
            torch.nn.init.normal_(weight, std=width)
        pipe.save_pretrained(folder / name)
    return folder


def test_each_picture_is_its_own_serial_one(folders: Path) -> None:
    """Clients at once, with models, sizes and guidance of their own, in whatever batches."""
    asked = [
        {"model": model, "prompt": prompt, "seed": 7 * k, "guidance_scale": scale, "size": size}
        for k, (model, prompt, scale, size) in enumerate(
            (model, prompt, scale, size)
            for model in ("one", "two")
            for prompt, scale in (("a cat", 1.0), ("a (dog:1.2)", 5.0), ("cat " * 30, 2.0))
            for size in (32, 48)
        )
    ]
    models = Models(Settings(models=(str(folders),), max_models=1))

    def order(one: dict[str, Any]) -> Order:
        shared = {"height": one["size"], "width": 32, "num_inference_steps": 3}
        return Order(
            one["prompt"],
            one["seed"],
            guidance_scale=one["guidance_scale"],
            arguments={**shared, "prompt_syntax": "a1111"},
            model=one["model"],
        )

    with started(models, batch_size=4) as engine, ThreadPoolExecutor(len(asked)) as pool:
        jobs = pool.map(lambda k: engine.submit(str(k % 5), [order(asked[k])]), range(len(asked)))
        made = [result(job)[0] for job in jobs]
    assert len(models.loaded) == 1
    sizes = {one.settings["batch"]["size"] for one in made}
    assert max(sizes) > 1  # some were made together
    for one, wanted in zip(made, asked, strict=True):
        pipeline = LatentDiffusionPipeline.from_pretrained(folders / str(wanted["model"]))
        alone = pipeline(
            wanted["prompt"],
            seed=wanted["seed"],
            guidance_scale=wanted["guidance_scale"],
            height=wanted["size"],
            width=32,
            num_inference_steps=3,
            prompt_syntax="a1111",
            progress=False,
        ).images[0]
        difference = np.abs(np.int16(one.image) - np.int16(alone))
        assert one.image.size == alone.size and difference.max() <= 1
        assert one.settings["model"]["name"] == wanted["model"]


def test_models_by_name(folders: Path, tmp_path: Path) -> None:
    models = Models(Settings(models=(str(folders),), vaes=(str(folders / "two" / "vae"),)))
    assert (models.names, models.vaes, models.loaded) == (["one", "two"], ["vae"], [])
    with models.use(None, None) as first, models.use("two", "vae") as second:
        assert first.model["name"] == "one" and second.model["name"] == "two"
    assert models.loaded == ["one", "two"]
    for model, vae, words in (
        ("three", None, "model must be one of one, two; got 'three'"),
        (str(folders / "one"), None, "model must be one of"),
        ("../one", None, "model must be one of"),
        (None, "va", "vae must be one of Automatic, vae; got 'va'. Did you mean 'vae'"),
    ):
        with pytest.raises(UserError, match=words), models.use(model, vae):
            pass
    assert Models(Settings()).names == [EMBEDDED]
    with pytest.raises(UserError, match="neither a model"):
        Models(Settings(models=(str(tmp_path),)))
    shutil.copytree(folders / "one", tmp_path / "one")
    with pytest.raises(UserError, match="two models are called one"):
        Models(Settings(models=(str(folders), str(tmp_path / "one"))))


def test_a_model_that_cannot_be_loaded_fails_its_request_alone(folders: Path) -> None:
    models = Models(Settings(models=(str(folders / "one"), str(folders / "gone"))))
    with started(models) as engine:
        bad = engine.submit("a", orders("a", model="gone"))
        good = engine.submit("b", orders("b", arguments={"num_inference_steps": 1}))
        with pytest.raises(UserError):
            result(bad)
        assert len(result(good)) == 1


@pytest.mark.parametrize("part", ["model", "vae", "lora", "word"])
def test_pickles_are_refused(part: str, folders: Path, tmp_path: Path) -> None:
    """Of a folder's parts too, and though they hold nothing but tensors."""
    shutil.copytree(folders / "one", tmp_path / "one")
    pickle = tmp_path / "file.bin"
    torch.save({"x": torch.zeros(2)}, pickle)
    settings = {
        "model": {"models": (str(tmp_path / "one"),)},
        "vae": {"vaes": (str(pickle),), "models": (str(folders),)},
        "lora": {"loras": (str(pickle),), "models": (str(tmp_path / "one"),)},
        "word": {"embeddings": (str(pickle),), "models": (str(tmp_path / "one"),)},
    }[part]
    if part == "model":
        weights = tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    models = Models(Settings(**settings))
    name, words = "file" if part == "vae" else None, "is a pickle, which is not read here"
    with pytest.raises(UserError, match=words), models.use(None, name):
        pass
