"""How an image was made, in its file: written and read, other programs' files too."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from latentdiff.errors import UserError
from latentdiff.images import save_image
from latentdiff.pipelines.metadata import (
    A1111,
    parameters,
    pixels_hash,
    read,
    read_parameters,
    write,
    write_parameters,
)

SETTINGS: dict[str, Any] = {
    "task": "text_to_image",
    "arguments": {},
    "prompt": "a cat",
    "negative_prompt": "",
    "prompt_syntax": "plain",
    "num_inference_steps": 4,
    "sampler": "euler",
    "timestep_spacing": "karras",
    "guidance_scale": 7.0,
    "seed": 112358132141,
    "height": 16,
    "width": 24,
    "model": {"name": "m [v1, x]", "hash": "0123456789"},
    "versions": {"latentdiff": "0.1.0"},
}
LINE = "Steps: 4, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"
SIGNS = "ab:,\"\\' \nc\u00e9\u30c6\U0001f600<>()[]{}-\t1"
IMAGE = Image.new("RGB", (24, 16), (9, 200, 30))


def some_text(draw: random.Random, signs: str = SIGNS) -> str:
    return "".join(draw.choices(signs, k=draw.randrange(30)))


@pytest.mark.parametrize("seed", range(50))
def test_parameters_are_read_as_they_were_written(seed: int) -> None:
    draw = random.Random(seed)
    prompt, negative = some_text(draw).strip(), some_text(draw).strip()
    fields = {"Steps": "4", "Seed": "1", "Extra A/b-c": some_text(draw), "Model": some_text(draw)}
    text = write_parameters(prompt, negative, {**fields, "Nothing": None})
    assert read_parameters(text) == (prompt, negative, fields)
    assert text.rpartition("\n")[2].startswith("Steps: 4, Seed: 1, Extra A/b-c: ")


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "fields"),
    [
        (f"a cat\n{LINE}", "a cat", "", {"Steps": "4", "Seed": "1", "Size": "64x64"}),
        ("a cat\nNegative prompt: dog", "a cat", "dog", {}),
        (
            "x,\n<lora:aa:1>, <lora:bb:1>, <lora:cc:1>, sky",
            "x,\n<lora:aa:1>, <lora:bb:1>, <lora:cc:1>, sky",
            "",
            {},
        ),
        ("style: ink, mood: calm, light: low", "style: ink, mood: calm, light: low", "", {}),
        (
            f"a\nSteps: 9, Seed: 9, Size: 8x8\nb\n{LINE}",
            "a\nSteps: 9, Seed: 9, Size: 8x8\nb",
            "",
            {"Steps": "4", "Seed": "1"},
        ),
        (f"a\r\nNegative prompt: b\r\n\r\nc\r\n{LINE}\r\n", "a", "b\n\nc", {"Steps": "4"}),
        (LINE, "", "", {"Steps": "4"}),
        (f"Negative prompt: b\n{LINE}", "", "b", {"Steps": "4"}),
        ("", "", "", {}),
        ("\n\n", "", "", {}),
        (
            f'a\n{LINE}, Model: "m [v1, x]", Xy: "a" b',
            "a",
            "",
            {"Model": "m [v1, x]", "Xy": '"a" b'},
        ),
        (f'a\n{LINE}, Lora hashes: "s: 12, t: 3", Version: v1.9.3', "a", "", {"Version": "v1.9.3"}),
        (f'a\n{LINE}, Xy: "unclosed, Yz: 2', "a", "", {"Xy": '"unclosed', "Yz": "2"}),
    ],
)
def test_parameters_with_parts_missing_and_look_alike_text(
    text: str, prompt: str, negative: str, fields: dict[str, str]
) -> None:
    *prompts, found = read_parameters(text)
    assert prompts == [prompt, negative]
    assert {**found, **fields} == found and bool(found) == bool(fields)


@pytest.mark.parametrize("line", ["a" * 10**6, 'ab: "x ' * 20_000, ", ".join(["a: b"] * 30_000)])
def test_long_lines_are_read_at_once(line: str) -> None:
    assert read_parameters(line) == (line.strip(), "", {})


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "avif"])
@pytest.mark.parametrize("seed", range(4))
def test_settings_survive_in_a_file_of_each_kind(ending: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    texts = {key: some_text(draw, SIGNS + "\r\u2028\x00\ud83d") for key in ("prompt", "x", "y")}
    settings = {**SETTINGS, **texts, "model": {"name": "n"}, "seed": draw.getrandbits(64)}
    record = read(write(IMAGE, tmp_path / f"a.{ending}", settings))
    assert record.settings == {**settings, "pixels": pixels_hash(IMAGE)}
    assert (record.program, record.why_not, record.edited) == ("latentdiff", "", [])


def test_what_a_photo_program_keeps_and_a_text_too_long_for_exif(tmp_path: Path) -> None:
    long = {**SETTINGS, "prompt": "x" * 40_000}
    with pytest.warns(UserWarning, match=r"how they were made \(EXIF.*; they are in a\.png"):
        found = write(IMAGE, tmp_path / "a.jpg", long)
    assert found.name == "a.png" and read(found).settings["prompt"] == long["prompt"]
    with Image.open(write(IMAGE, tmp_path / "b.jpg", SETTINGS)) as image:
        exif = image.getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + parameters(SETTINGS).encode("utf-16-be")


def chunks(file: Path) -> dict[bytes, list[bytes]]:
    data, place, found = file.read_bytes(), 8, dict[bytes, list[bytes]]()
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        found.setdefault(kind, []).append(data[place + 8 : place + 8 + length])
        place += length + 12
    return found


@pytest.mark.parametrize(
    ("prompt", "kind", "begins"),
    [
        ("café", b"tEXt", b"parameters\0caf\xe9\nSteps"),
        ("テスト 😀", b"iTXt", b"parameters\0\0\0\0\0" + "テスト 😀\nSteps".encode()),
    ],
)
def test_png_text_is_latin_1_or_utf_8(
    prompt: str, kind: bytes, begins: bytes, tmp_path: Path
) -> None:
    file = write(IMAGE, tmp_path / "a.png", {**SETTINGS, "prompt": prompt})
    assert next(c for c in chunks(file)[kind] if c.startswith(b"parameters")).startswith(begins)
    assert read(file).settings["prompt"] == prompt


def test_the_text_has_what_other_programs_show() -> None:
    settings = {
        **SETTINGS,
        "arguments": {"strength": 0.75, "mask_blur": 4},
        "clip_skip": 1,
        "loras": [{"name": "fur", "hash": "ab12"}],
    }
    assert parameters(settings) == (
        "a cat\nSteps: 4, Sampler: Euler, Schedule type: Karras, CFG scale: 7, "
        'Seed: 112358132141, Size: 24x16, Model hash: 0123456789, Model: "m [v1, x]", '
        'Denoising strength: 0.75, Clip skip: 2, Mask blur: 4, Lora hashes: "fur: ab12", '
        "RNG: CPU, Version: latentdiff 0.1.0"
    )


def png(folder: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    IMAGE.save(folder / "a.png", pnginfo=info)
    return folder / "a.png"


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected"),
    [
        ("DPM++ 2M", "Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", None, ("dpmpp_2m_sde", "exponential")),
        ("dpm++ 2m", "karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", None, ("dpmpp_2m", "linspace")),
        ("Euler a", None, ("euler_ancestral", "linspace")),
        ("Euler a", "Automatic", ("euler_ancestral", "linspace")),
        ("Euler", "Align Your Steps", ("euler", "align_your_steps")),
        ("DDIM", None, ("ddim", "leading")),
        ("LCM", None, ("lcm", "lcm")),
    ],
)
def test_samplers_and_schedules_of_a1111(
    sampler: str, schedule: str | None, expected: tuple[str, str], tmp_path: Path
) -> None:
    line = LINE.replace("Euler", sampler + (f", Schedule type: {schedule}" if schedule else ""))
    record = read(png(tmp_path, parameters=f"a <lora:fur:0.5> cat\n{line}, Clip skip: 2"))
    assert record.why_not == "" and record.program == A1111
    assert (record.settings["sampler"], record.settings["timestep_spacing"]) == expected
    assert record.settings["clip_skip"] == 1 and record.settings["prompt"] == "a  cat"
    assert record.settings["loras"] == [{"name": "fur", "weight": 0.5}]


COMFYUI = {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["4", 0]}}}
INVOKEAI = {"positive_prompt": "a cat", "seed": 5, "scheduler": "euler"}


@pytest.mark.parametrize(
    ("texts", "program", "why_not", "shown"),
    [
        ({}, "", "does not say how it was made", {}),
        ({"Software": "x"}, "", "it has texts called Software", {}),
        ({"parameters": "a cat"}, A1111, "no settings", {"prompt": "a cat"}),
        (
            {"parameters": f"a\n{LINE}, Denoising strength: 0.5"},
            A1111,
            "made from another image",
            {"Seed": "1"},
        ),
        (
            {"parameters": f"a\n{LINE}, Denoising strength: 0.5, Hires resize: 64x32"},
            A1111,
            "its second pass (hires fix) has another shape",
            {},
        ),
        ({"parameters": f"a\n{LINE}".replace("Euler", "DPM fast")}, A1111, "DPM fast", {}),
        ({"parameters": f"a\n{LINE}, Schedule type: Beta"}, A1111, "'Beta'", {}),
        ({"parameters": "a\nSteps: x, Sampler: Euler, CFG scale: 7, Seed: 1"}, A1111, "'x'", {}),
        ({"parameters": "a\nSteps: 4, Sampler: Euler, CFG scale: 7"}, A1111, "lack 'Seed'", {}),
        ({"prompt": json.dumps(COMFYUI)}, "ComfyUI", "graph", {"KSampler: seed": 5}),
        ({"workflow": '{"nodes": []}'}, "ComfyUI", "graph", {}),
        ({"invokeai_metadata": json.dumps(INVOKEAI)}, "InvokeAI", "InvokeAI's own", INVOKEAI),
        ({"latentdiff": "[1"}, "latentdiff", "damaged", {}),
        ({"latentdiff": json.dumps({**SETTINGS, "seed": "1"})}, "latentdiff", "seed is '1'", {}),
        ({"latentdiff": json.dumps({"seed": 1})}, "latentdiff", "prompt is missing", {}),
        ({"latentdiff": "{" * 100_000}, "latentdiff", "damaged", {}),
    ],
)  # fmt: skip
def test_files_that_cannot_be_made_again_say_why(
    texts: dict[str, str], program: str, why_not: str, shown: dict[str, Any], tmp_path: Path
) -> None:
    record = read(png(tmp_path, **texts))
    assert record.program == program and why_not in record.why_not
    assert {**record.settings, **shown} == record.settings


def test_comfyui_in_webp_and_what_is_no_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = 'workflow:{"nodes": []}', f"prompt:{json.dumps(COMFYUI)}"
    IMAGE.save(tmp_path / "a.webp", exif=exif)
    record = read(tmp_path / "a.webp")
    assert (record.program, record.settings) == ("ComfyUI", {"KSampler: seed": 5})
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as an image"):
            read(tmp_path / name)


def test_a_text_that_was_edited_is_told_from_the_settings(tmp_path: Path) -> None:
    text = parameters(SETTINGS).replace("a cat", "a dog").replace("Seed: 11", "Seed: 12")
    file = save_image(
        IMAGE, tmp_path / "a.png", {"parameters": text, "latentdiff": json.dumps(SETTINGS)}
    )
    record = read(file)
    assert record.edited == ["prompt", "Seed"] and record.settings == SETTINGS


def test_two_passes_of_a1111(tmp_path: Path) -> None:
    passes = "Denoising strength: 0.4, Hires upscale: 1.5, Hires upscaler: Latent"
    record = read(png(tmp_path, parameters=f"a cat\n{LINE}, {passes}"))
    assert record.why_not == ""
    assert record.settings["arguments"] == {"hires_scale": 1.5, "hires_strength": 0.4}
