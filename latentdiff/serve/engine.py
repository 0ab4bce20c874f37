"""One queue in front of the models: fair between clients, compatible images in one batch.

A request is a `Job` of one or more images. A thread takes images off the queue, one client after
the other, adds those that can be sampled with the first (same model, size, steps, sampler …), and
calls the pipeline; what stands beside an image does not change it. Protocols know nothing of
models or threads: they submit jobs and wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, warn, warnings_heard
from latentdiff.models.prompts import NETWORK

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.pipelines.task import Progress as PassProgress
    from latentdiff.serve.models import Models

#: The usual task of `Order`.
TEXT_TO_IMAGE = "text_to_image"


class Full(Exception):  # noqa: N818  (a state, which passes)
    """The queue holds as many images as it may; try again in `.seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s.")
        self.seconds = seconds


class Stopping(Exception):  # noqa: N818
    """The server is going down."""

    def __init__(self) -> None:
        super().__init__("the server is stopping; the request was not done.")


class Cancelled(Exception):  # noqa: N818
    """Who asked for it no longer waits."""


@dataclass(frozen=True)
class Order:
    """One image to be made."""

    prompt: str
    seed: int
    task: str = TEXT_TO_IMAGE
    """A name in `pipelines.task.TASKS`."""
    negative_prompt: str = ""
    guidance_scale: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """The pipeline's others, by name. Images of a job share the object."""
    model: str | None = None
    """A name in `Models`; None: the default."""
    vae: str | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for orders that can be made in one batch."""
        if self.task == TEXT_TO_IMAGE:
            arguments: Any = json.dumps(self.arguments, sort_keys=True, default=str)
        else:
            arguments = id(self.arguments)  # they hold images
        return self.task, self.model, self.vae, arguments


@dataclass(frozen=True)
class Made:
    """One image that was made."""

    image: Image
    settings: dict[str, Any]
    """As `PipelineOutput.settings`."""
    flagged: bool = False
    """By the safety checker."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    ahead: int = 0
    """Images of others in front of it; 0 once it is being made."""
    made: int = 0
    of: int = 1
    step: int = 0
    """Of the batch that is being made, and below how many it has."""
    steps: int = 0
    share: float = 0.0
    """0 … 1 of the whole job."""
    seconds_left: float | None = None
    """None: not known yet."""
    previews: Sequence[Image] = ()
    """How the images that are being made look so far."""


class Job:
    """What one request asks for. Its methods may be called from any thread."""

    def __init__(self, client: str, orders: Sequence[Order], previews: bool) -> None:
        self.client, self.orders, self.wants_previews = client, list(orders), previews
        self.images: list[Made | None] = [None] * len(self.orders)
        self.notes: list[str] = []
        """Warnings of the pipeline, such as that a prompt was cut."""
        self.progress = Progress(of=len(self.orders))
        self.ended = False
        """Nothing more is made of it: done, failed, interrupted or cancelled."""
        self.error: BaseException | None = None
        self._done = threading.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def made(self) -> list[Made]:
        """The images so far, in their order."""
        return [one for one in self.images if one is not None]

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.ended = True
        self.finish(Cancelled())

    def finish(self, error: BaseException | None = None) -> None:
        """Let those who wait go on. The first call counts."""
        if not self._done.is_set():
            self.ended, self.error = True, error
            self._done.set()
        self.tell()

    def report(self, progress: Progress) -> None:
        """Take down how far it is."""
        self.progress = progress
        self.tell()

    def tell(self) -> None:
        for listener in list(self._listeners):
            listener()

    async def events(self) -> AsyncGenerator[Progress]:
        """How far it is, whenever that changes, until it is done; raises what it failed of."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(changed.set)

        self._listeners.append(listener)
        try:
            while not self._done.is_set():
                yield self.progress
                await changed.wait()
                changed.clear()
        finally:
            self._listeners.remove(listener)
        if self.error is not None:
            raise self.error

    async def result(self) -> list[Made]:
        """Its images. Raises: UserError, Stopping, Cancelled, or what else it failed of."""
        async for _ in self.events():
            pass
        return self.made


_Unit = tuple[Job, int]
"""An image of a job by its number."""


class Engine:
    """The queue and the thread that empties it."""

    def __init__(
        self,
        models: Models,
        *,
        batch_size: int = 8,
        max_waiting: int = 256,
        idle: float = 0,
        hide: Callable[[str], str] = str,
        keep: Callable[[Made], None] | None = None,
    ) -> None:
        self.models, self.batch_size, self.max_waiting = models, batch_size, max_waiting
        self._idle = idle
        self._keep = keep
        self.hide = hide
        """Takes out of a text what clients must not read."""
        self.made, self.seconds = 0, 0.0
        """Images so far, and what they took."""
        self._waiting: dict[str, deque[_Unit]] = {}
        """By client, in the order of their turns."""
        self._running: list[_Unit] = []
        self.pace = 1.0
        """Seconds an image, lately."""
        self._changed = threading.Condition()
        self._stopping = self._hurried = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> list[Job]:
        """The jobs whose images are being made."""
        return list(dict.fromkeys(job for job, _ in list(self._running)))

    @property
    def waiting(self) -> int:
        """Images that wait."""
        own = [unit for units in list(self._waiting.values()) for unit in list(units)]
        return sum(not job.ended for job, _ in own)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def submit(self, client: str, orders: Sequence[Order], *, previews: bool = False) -> Job:
        """Queue a request.

        Args:    client: who asks; turns go round between clients.
                 previews: whether `Progress.previews` are wanted.
        Raises:  UserError: more images than the queue ever holds.  Full: than it holds now.
                 Stopping: the server is going down.
        """
        if not 0 < len(orders) <= self.max_waiting:
            raise UserError(
                f"one request may ask for 1 to {self.max_waiting} images; got {len(orders)}."
            )
        job = Job(client, orders, previews)
        with self._changed:
            if self._stopping:
                raise Stopping
            self._drop_ended()
            ahead = self.waiting
            if ahead + len(orders) > self.max_waiting:
                raise Full(max(1, round(ahead * self.pace)))
            own = self._waiting.setdefault(client, deque())
            own.extend((job, k) for k in range(len(orders)))
            self._report_places()
            self._changed.notify()
        return job

    def _report_places(self) -> None:
        """Tell jobs that wait how many images come before their first."""
        turns = zip_longest(*self._waiting.values())
        jobs = [unit[0] for turn in turns for unit in turn if unit is not None]
        running = set(self.running)
        for place, job in reversed(list(enumerate(jobs, len(self._running)))):
            if job not in running and not job.made:
                left = (place + len(job.orders)) * self.pace
                job.report(Progress(ahead=place, of=len(job.orders), seconds_left=left))

    def stop(self, seconds: float = 7) -> None:
        """Refuse what comes and what waits; finish what is being made, for so long at most."""
        with self._changed:
            self._stopping = True
            refused = {job for own in self._waiting.values() for job, _ in own}
            self._waiting.clear()
            self._changed.notify()
        for job in refused:  # also one of which some images are being made
            job.finish(Stopping())
        threading.Thread(target=self._hurry, args=[seconds], daemon=True).start()

    def ended(self, seconds: float) -> bool:
        """Wait so long for the work after `stop` to end. Returns: whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _hurry(self, seconds: float) -> None:
        self._thread.join(seconds)
        self._hurried = True
        for job in self.running:
            job.finish(Stopping())

    def jobs(self, client: str) -> list[Job]:
        """This client's, those that are being made first."""
        with self._changed:
            running = [job for job in self.running if job.client == client]
            return list(dict.fromkeys(running + [j for j, _ in self._waiting.get(client, ())]))

    def interrupt(self, client: str) -> None:
        """End this client's jobs: their results are the images so far, as they are; of a batch that
        others are in, those before it."""
        with self._changed:
            running, own = self.running, self.jobs(client)
            for job in own:
                job.ended = True
            alone = all(job.ended for job in running)
            for job in own:
                if not (alone and job in running):
                    job.finish()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (units := self._next_batch()):
                    if self._stopping:
                        return
                    if not self._changed.wait(self._idle or None):
                        self.models.unload()
                self._running = units
                self._report_places()
            self._make(units)
            with self._changed:
                self._running = []
                still = {job for own in self._waiting.values() for job, _ in own}
            for job in dict.fromkeys(job for job, _ in units):
                if job.ended or job not in still:
                    job.finish()

    def _drop_ended(self) -> None:
        """Take images off the queue that nobody wants any more."""
        for client, own in list(self._waiting.items()):
            kept = deque(unit for unit in own if not unit[0].ended)
            if kept:
                self._waiting[client] = kept
            else:
                del self._waiting[client]

    def _next_batch(self) -> list[_Unit]:
        """The image whose turn it is and those that go with it; off the queue."""
        self._drop_ended()
        units, before = list[_Unit](), -1
        while before < len(units) < self.batch_size:
            before = len(units)
            for client, own in list(self._waiting.items()):
                unit = next((u for u in own if not units or _kind(u) == _kind(units[0])), None)
                if unit is not None and len(units) < self.batch_size:
                    units.append(unit)
                    own.remove(unit)
                    # Its next turn comes after the others'.
                    del self._waiting[client]
                    if own:
                        self._waiting[client] = own
        return units

    def _make(self, units: list[_Unit]) -> None:
        """Make the images of a batch; what one job is to blame for does not fail the others."""
        jobs = list(dict.fromkeys(job for job, _ in units))
        try:
            with warnings_heard() as notes:
                self._draw(units, jobs)
        except Exception as error:
            if len(jobs) == 1:
                known = isinstance(error, UserError)
                jobs[0].finish(UserError(self.hide(str(error))) if known else error)
                return
            for job in jobs:
                self._make([unit for unit in units if unit[0] is job])
            return
        for job in jobs:
            texts = {text for own, k in units if own is job for text in _texts(own.orders[k])}
            own = {self.hide(n.message) for n in notes if not n.about or texts & set(n.about)}
            job.notes += sorted(own - set(job.notes))

    def _draw(self, units: list[_Unit], jobs: list[Job]) -> None:
        orders = [job.orders[k] for job, k in units]
        first, begun, seen = orders[0], time.monotonic(), set[int]()

        def on_progress(at: PassProgress) -> None:
            seen.update(at.indices)
            if self._hurried or all(job.ended for job in jobs):
                pipeline._interrupt = True
            self._report(units, jobs, at, (time.monotonic() - begun) / at.step)

        with self.models.use(first.model, first.vae) as pipeline:
            usual, given = pipeline.default_guidance, [order.guidance_scale for order in orders]
            scales = [usual if scale is None else scale for scale in given]
            # Where none is given, a task may have a default of its own.
            guidance: dict[str, Any] = {} if set(given) == {None} else {"guidance_scale": scales}
            begun = time.monotonic()
            output = getattr(pipeline, first.task)(
                prompt=[order.prompt for order in orders],
                negative_prompt=[order.negative_prompt for order in orders],
                seed=[order.seed for order in orders],
                num_images_per_prompt=1,
                lora_dir=self.models.lora_dir,
                batch_size=self.batch_size,
                progress=False,
                on_progress=on_progress,
                **guidance,
                **first.arguments,
            )
        self.pace = (time.monotonic() - begun) / len(units)
        self.seconds += time.monotonic() - begun
        self.made += len(output.images)
        made = range(len(units)) if len(output.images) == len(units) else sorted(seen)
        if len(made) == len(output.images):  # else it was interrupted while passes were halved
            flagged = output.flagged or [False] * len(made)
            images = zip(output.images, output.settings, flagged, strict=True)
            for n, image in zip(made, images, strict=True):
                job, k = units[n]
                job.images[k] = one = Made(*image)
                if self._keep is not None and "interrupted" not in one.settings:
                    try:
                        self._keep(one)
                    except UserError as error:  # the disk is full; who asked has the image
                        warn(str(error))

    def _report(self, units: list[_Unit], jobs: list[Job], at: PassProgress, each: float) -> None:
        """Tell the jobs of a batch how far it is.

        Args:    each: seconds a step.
        """
        wanted = any(job.wants_previews and not job.ended for job in jobs)
        previews = dict(zip(at.indices, at.preview, strict=True)) if wanted else {}
        for job in jobs:
            own = [n for n, unit in enumerate(units) if unit[0] is job]
            shown = [previews[n] for n in own if n in previews] if job.wants_previews else []
            many, made = len(job.orders), len(job.made)
            share = (made + len(own) * at.step / at.total) / many
            left = (at.total - at.step) * each + (many - made - len(own)) * self.pace
            job.report(Progress(0, made, many, at.step, at.total, share, left, shown))


def _kind(unit: _Unit) -> tuple[Any, ...]:
    job, k = unit
    return job.orders[k].kind


def _texts(order: Order) -> set[str]:
    """The texts of an image as warnings quote them: with the tags of LoRA files, and without."""
    return {order.prompt, NETWORK.sub("", order.prompt).strip(), order.negative_prompt}
