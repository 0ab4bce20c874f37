"""Prompt files in every form: what a row says, and that every wrong line is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from latentdiff.cli.prompt_file import read_prompt_file
from latentdiff.errors import UserError

FULL = {
    "prompt": "a",
    "negative_prompt": "b, c",
    "seed": 2**64 - 1,
    "height": 64,
    "width": 128,
    "num_inference_steps": 3,
    "guidance_scale": 2.5,
    "sampler": "Euler a",
    "timestep_spacing": "karras",
    "num_images_per_prompt": 1,
}


def written(folder: Path, ending: str, text: str | bytes) -> Path:
    file = folder / f"prompts{ending}"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return file


@pytest.mark.parametrize(
    ("ending", "text", "rows"),
    [
        (
            ".txt",
            '\ufeff--prompt "a, b" --negative_prompt "y" --seed 5\r\nplain\r\n\r\n世界 ä\r\n',
            {
                1: {"prompt": "a, b", "negative_prompt": "y", "seed": 5},
                2: {"prompt": "plain"},
                4: {"prompt": "世界 ä"},
            },
        ),
        (
            ".txt",
            '--prompt a cat, "it\'s --red" --negative --steps 3\n a cat --seed 5 {a|b}\n# c',
            {
                1: {"prompt": "a cat, it's --red", "num_inference_steps": 3},
                2: {"prompt": "a cat --seed 5 {a|b}"},
                3: {"prompt": "# c"},
            },
        ),
        (
            ".jsonl",
            '{"prompt": "a", "negative": "b, c", "seed": 18446744073709551615, "size": "64x128", '
            '"steps": 3, "cfg_scale": 2.5, "sampler_name": "Euler a", "spacing": "karras", '
            '"num_images": 1}\n\n{"prompt": "x\\u2028\\ny", "seed": null, "guidance": 3}',
            {1: FULL, 3: {"prompt": "x\u2028\ny", "guidance_scale": 3}},
        ),
        (
            ".csv",
            "\ufeffPrompt,Negative Prompt,seed,Size,steps,guidance,sampler,spacing,num_images\r\n"
            'a,"b, c",18446744073709551615,64x128,3,2.5,Euler a,karras,1\r\n'
            '"a, ""c""\nd",,,,,,,,\r\n,,,,,,,,\r\n',
            {2: FULL, 3: {"prompt": 'a, "c"\nd'}},
        ),
        (".csv", "seed;prompt\n1;a; b\n", {2: {"seed": 1, "prompt": "a; b"}}),
    ],
)
def test_rows(ending: str, text: str, rows: dict[int, Any], tmp_path: Path) -> None:
    found = read_prompt_file(written(tmp_path, ending, text))
    assert {row.line: row.options for row in found} == rows


@pytest.mark.parametrize(
    ("ending", "text", "lines"),
    [
        (
            ".txt",
            "ok\n--prompt a --sede 1\n--seed 1\n--prompt 'a\n--prompt a --seed -1\n",
            {2: "a field must be one of .*Did you mean 'seed'", 3: "no prompt",
             4: "a quote is not closed", 5: "seed must be a whole number from 0"},
        ),
        (
            ".jsonl",
            '["a"]\n{"prompt": "a"\n{"prompt": 3}\n{"prompt": "a", "steps": 2.5}\n'
            '{"prompt": "a", "steps": "0"}\n{"prompt": "a", "seed": true}\n'
            '{"prompt": "a", "guidance": "much"}\n{"prompt": "a", "steps": 1, "Steps": 2}\n',
            {1: "must be like", 2: "it is not JSON", 3: "prompt must be text; got 3",
             4: "num_inference_steps must be a whole number; got 2.5",
             5: "num_inference_steps must be a whole number of at least 1",
             6: "seed must be a whole number; got True",
             7: "guidance_scale must be a number; got 'much'", 8: "'Steps' is given twice"},
        ),
        (
            ".csv",
            "prompt,size,guidance\na,big,\nb,0x64,\nc,9999x9999,\nd,,-1\n,64,\n",
            {2: "size must be like", 3: "at least 1", 4: "at most", 5: "at least 0",
             6: "no prompt"},
        ),
        (".csv", 'prompt,seed\na,1\n"b,2\nc,3\n', {3: "is not valid CSV"}),
        (".txt", b"a\n\n\xe9", {3: "is not UTF-8"}),
    ],
)  # fmt: skip
def test_every_wrong_line_is_named(
    ending: str, text: Any, lines: dict[int, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read_prompt_file(written(tmp_path, ending, text))
    said = str(error.value).splitlines()
    assert len(said) == len(lines)
    for one, (number, words) in zip(said, lines.items(), strict=True):
        assert f"line {number}" in one
        assert re.search(words, one), one


def test_many_wrong_lines_are_counted_and_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 10: .*\nand 90 more lines$"):
        read_prompt_file(written(tmp_path, ".txt", "--seed 1\n" * 100))
    for ending in (".txt", ".jsonl", ".csv"):
        with pytest.raises(UserError, match="holds no prompt"):
            read_prompt_file(written(tmp_path, ending, "\n \n"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_prompt_file(tmp_path / "none.txt")
