"""What a caller sees and changes while images are made: callbacks, streams, previews, no memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.images import WHITE, to_rgb, to_tensor
from latentdiff.diffusion.noise import step_noise
from latentdiff.diffusion.samplers import SAMPLERS, resume
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.images import to_output
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.preview import STABLE_DIFFUSION, apply_linear, fitted, linear_decoder
from latentdiff.models.vae import AutoencoderKL
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.task import TASKS, PipelineOutput, Progress
from latentdiff.sampling import SamplingPlan, build_denoiser, sampled_states
from tests.random_models import make_pipeline, make_vae

QUIET: dict[str, Any] = {"progress": False, "num_inference_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder)


def test_a_callback_sees_and_changes_what_it_does_in_diffusers(
    pipeline: LatentDiffusionPipeline,
) -> None:
    theirs = make_pipeline()
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: list[list[tuple[int, float]]] = [[], []]

    def record(calls: list[tuple[int, float]]) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> Any:
            assert list(given) == ["latents"]
            calls.append((step, float(timestep)))
            return {"latents": given["latents"] * 0.8} if step == 1 else given

        return callback

    call = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 3.0}
    expected = theirs("a cat", **call, callback_on_step_end=record(seen[0])).images[0]
    call |= {"progress": False, "sampler": "ddim"}
    found = pipeline("a cat", **call, callback_on_step_end=record(seen[1])).images[0]
    plain = pipeline("a cat", **call).images[0]
    assert seen[0] == seen[1]
    difference = np.asarray(found, int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 2
    assert np.abs(np.asarray(plain, int) - np.asarray(expected, int)).max() > 10
    with pytest.raises(UserError, match="must be one of latents, denoised; got 'latent'"):
        pipeline("a cat", callback_on_step_end_tensor_inputs=["latent"])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_goes_on_from_what_a_caller_wrote(
    pipeline: LatentDiffusionPipeline, name: str
) -> None:
    """As one that is resumed from the state with these latents."""
    plan = pipeline.sampling_plan(4, sampler=name)
    denoiser = build_denoiser(pipeline.network, pipeline.text_encoder.encode(["a cat"]))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def states(plan: SamplingPlan) -> Iterator[Any]:
        return sampled_states(pipeline.network, denoiser, noise, [7], plan)

    first = next(states(plan))
    wanted = first._replace(x_t=first.x_t * 0.5)
    own = step_noise([7], noise.shape[1:], torch.device("cpu"))
    rest = resume(name, wanted, denoiser, pipeline.schedule, plan.timesteps, own, **plan.options)
    *_, expected = rest
    for state in states(plan):
        if state.step == 0:
            state.x_t.mul_(0.5)
    torch.testing.assert_close(state.x_t, expected.x_t)


def test_a_stream_gives_every_step_and_then_what_a_call_gives(
    pipeline: LatentDiffusionPipeline,
) -> None:
    call = {**QUIET, "num_images_per_prompt": 3, "batch_size": 2, "output_type": "pt"}
    *steps, output = pipeline.stream("a cat", **call)
    assert isinstance(output, PipelineOutput)
    assert torch.equal(output.images, pipeline("a cat", **call).images)
    assert [event.step for event in steps] == list(range(1, 9))
    assert {event.total for event in steps} == {8}
    assert [event.indices for event in steps] == [[0, 1]] * 4 + [[2]] * 4
    last = steps[-1]
    assert isinstance(last, Progress)
    (rough,) = last.preview
    (expected,) = to_output(
        apply_linear(linear_decoder(pipeline.autoencoder), last.denoised), "pil"
    )
    assert rough.size == (16, 16)
    assert np.array_equal(rough, expected)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_streamed(pipeline: LatentDiffusionPipeline, task: str) -> None:
    given = {
        "inpaint": {"mask_image": Image.linear_gradient("L").resize((24, 16))},
        "outpaint": {"left": 8},
        "interpolate": {"frames": 3, "seed": [3, 4]},
    }
    call = {**QUIET, "output_type": "pt", **given.get(task, {})}
    if task not in ("text_to_image", "interpolate"):
        call["image"] = Image.new("RGB", (24, 16), "teal")
    *steps, output = pipeline.stream("a cat", task=task, **call)
    expected = getattr(pipeline, task)(prompt="a cat", **call)
    assert isinstance(output, PipelineOutput)
    assert torch.equal(output.images, expected.images)
    assert output.settings == expected.settings and output.settings[0]["task"] == task
    assert [event.step for event in steps] == list(range(1, output.steps + 1))
    with pytest.raises(UserError, match=r"task must be one of text_to_image, .*; got 'inpant'"):
        pipeline.stream("a cat", task="inpant")


@pytest.mark.skipif(not EMBEDDED_MODEL.is_dir(), reason="the embedded model is not there")
@torch.no_grad()
def test_a_linear_preview_has_the_colours_of_the_embedded_model_s_images() -> None:
    autoencoder = load_autoencoder(EMBEDDED_MODEL / "vae")
    files = sorted((Path(__file__).parents[2] / "examples" / "twemoji").glob("*.webp"))[::16]
    images = torch.stack([to_tensor(to_rgb(Image.open(f), WHITE), (64, 64)) for f in files])
    latents = autoencoder.encode(images)
    decoded = autoencoder.decode(latents)
    expected = F.adaptive_avg_pool2d(decoded, latents.shape[2:])
    best = fitted(latents, decoded)  # on these very images
    own, least = (
        float((apply_linear(decoder, latents) - expected).square().mean() / expected.var())
        for decoder in (linear_decoder(autoencoder), best)
    )
    assert own < max(0.1, 2 * least) < 0.5


def test_two_threads_on_one_pipeline_make_what_one_makes(
    pipeline: LatentDiffusionPipeline,
) -> None:
    calls = [{**QUIET, "output_type": "pt", "seed": seed, "sampler": name} for seed, name in
             enumerate(("ddim", "euler_ancestral", "dpmpp_2m", "unipc"))]  # fmt: skip
    serial = [pipeline("a cat", **call).images for call in calls]
    with ThreadPoolExecutor(2) as threads:
        parallel = list(threads.map(lambda call: pipeline("a cat", **call).images, calls))
    assert all(map(torch.equal, serial, parallel))


def test_what_is_stopped_stops_at_once(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network runs after a closed generator; after an interrupt what was seen is given back."""
    calls: list[str] = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append("unet"))
    decode = pipeline.autoencoder.decode
    monkeypatch.setattr(
        pipeline.autoencoder, "decode", lambda x: calls.append("decode") or decode(x)
    )
    call = {**QUIET, "num_images_per_prompt": 3, "batch_size": 1, "output_type": "latent"}
    stream = pipeline.stream("a cat", **call)
    next(stream), next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert calls == ["unet"] * 2
    kept: list[Tensor] = []

    def stop(pipe: Any, step: int, timestep: float, given: dict[str, Tensor]) -> None:
        kept.append(given["denoised"])
        pipe._interrupt = len(kept) == 6  # the second step of the second image

    names = ["denoised"]
    result = pipeline(
        "a cat", **call, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names
    )
    assert len(calls) == 2 + 6
    assert result.seeds == [3, 4]
    assert torch.equal(result.images[1:], kept[-1])
    kept.clear()
    four = {**call, "num_images_per_prompt": 1, "callback_on_step_end": stop}
    result = pipeline(
        ["a cat", "dog", "pain", "a"], **four, callback_on_step_end_tensor_inputs=names
    )
    assert [result.only(k).prompts[0].text for k in range(2)] == ["a cat", "dog"]
    assert len(pipeline("a cat", **call).images) == 3


def test_passes_are_halved_where_memory_runs_out(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**QUIET, "num_images_per_prompt": 5, "output_type": "pt", "sampler": "euler_ancestral"}
    whole, forward, most = pipeline("a cat", **call), pipeline.unet.forward, 4
    sizes: list[int] = []

    def small(x_t: Tensor, *args: Any, **more: Any) -> Tensor:
        sizes.append(len(x_t))
        if len(x_t) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x_t, *args, **more)

    monkeypatch.setattr(pipeline.unet, "forward", small)
    with pytest.warns(UserWarning, match="out of memory with 5 images at a time; going on with 2"):
        split = pipeline("a cat", **call)
    assert sizes == [10] + [4] * 8 + [2] * 4
    assert split.seeds == whole.seeds
    assert float((split.images - whole.images).abs().max()) <= 1 / 255
    most = 1
    with pytest.raises(UserError, match="not hold even one image"), pytest.warns(UserWarning):
        pipeline("a cat", **call)


def test_the_linear_preview_is_exact_where_the_decoder_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, decoder = (torch.randn(s, generator=generator) for s in ((2, 5, 6, 4), (6, 3)))
    images = apply_linear(decoder / 20, latents).repeat_interleave(8, 2).repeat_interleave(8, 3)
    torch.testing.assert_close(fitted(latents, images), decoder / 20, rtol=1e-4, atol=1e-5)


def test_previews_of_stable_diffusion_and_by_a_tiny_decoder(
    pipeline: LatentDiffusionPipeline,
) -> None:
    fields = {"block_out_channels": [128, 256, 512, 512]}
    kinds = {f"{way}_block_types": [f"{part}Block2D"] * 4 for way, part in
             (("down", "DownEncoder"), ("up", "UpDecoder"))}  # fmt: skip
    with torch.device("meta"):
        sd = Autoencoder(AutoencoderKL(fields | kinds))
    assert torch.equal(linear_decoder(sd)[:4], torch.tensor(STABLE_DIFFUSION))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for wrong in (latents[:, :3], latents[0]):
        with pytest.raises(UserError, match=r"shape \(images, 4, height, width\)"):
            pipeline.preview(wrong)
    pipeline.preview_decoder = Autoencoder(make_vae("tiny"))
    (image,) = pipeline.preview(latents)
    expected = (make_vae("tiny").decode(latents).sample / 2 + 0.5).clamp(0, 1)[0] * 255
    assert np.abs(np.asarray(image) - expected.detach().permute(1, 2, 0).numpy()).max() <= 0.51
