"""styles.csv as A1111 has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.errors import UserError
from latentdiff.pipelines.styles import Style, read_styles, styled

HEADER = "name,prompt,negative_prompt\n"


def written(folder: Path, text: str) -> Path:
    file = folder / "styles.csv"
    file.write_bytes(text.encode("utf-8-sig"))
    return file


def test_a_cell_is_what_its_quotes_hold(tmp_path: Path) -> None:
    text = HEADER + 's,"a, ""c""\nd",e\r\n\nTinte 墨,"{prompt}, ink",\nbare,x\n'
    assert read_styles(written(tmp_path, text)) == {
        "s": Style('a, "c"\nd', "e"),
        "Tinte 墨": Style("{prompt}, ink", ""),
        "bare": Style("x", ""),
    }


@pytest.mark.parametrize(
    ("names", "prompt", "negative"),
    [
        ([], "a cat", ""),
        (["ink"], "ink of a cat, a cat!", "photo"),
        (["oil"], "a cat, oil", ""),
        (["oil", "ink"], "ink of a cat, oil, a cat, oil!", "photo"),
        (["ink", "oil"], "ink of a cat, a cat!, oil", "photo"),
    ],
)
def test_styles_go_around_or_after(names: list[str], prompt: str, negative: str) -> None:
    styles = {"ink": Style("ink of {prompt}, {prompt}!", "photo"), "oil": Style(" oil ", "")}
    assert styled(styles, names, "a cat", "") == (prompt, negative)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,text\na,b\n", "must have the columns name, prompt and negative_prompt; it has"),
        (HEADER + "a,b,\n,c,\n", "line 3: a style needs a name of its own; got ''"),
        (HEADER + 'a,"b\n",\na,c,\n', "line 4: a style needs a name of its own; got 'a'"),
        (HEADER + 'a,"b,\nc,d,\n', "line 2 is not valid CSV"),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_styles(written(tmp_path, text))
    with pytest.raises(
        UserError, match=r"style must be one of ink; got 'inc'\. Did you mean 'ink'\?"
    ):
        styled({"ink": Style("", "")}, ["inc"], "", "")
