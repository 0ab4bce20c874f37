"""Words from strangers' files are shown, and do not act on the terminal that shows them."""

import warnings

import pytest

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError, command, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat.png", "cat.png"),
        ("\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
        ("\x9b2Jcsi\x7f\x00", r"\x9b2Jcsi\x7f\x00"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("gpj.\u202eexe\u2066", r"gpj.\u202eexe\u2066"),
        ("half \ud83d", r"half \ud83d"),
        ("née 猫\u3000👩\u200d🚀 می\u200cخواهم", "née 猫\u3000👩\u200d🚀 می\u200cخواهم"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


def test_errors_are_printable_and_keep_their_lines() -> None:
    assert str(UserError("2 problems:\n  \x1b]0;title\x07.png")) == (
        "2 problems:\n  \\x1b]0;title\\x07.png"
    )


def test_warnings_of_a_command_are_printable() -> None:
    shown = []

    @command
    def main() -> None:
        text = "cut off: \x1b]0;title\x07\nsecond line"
        shown.append(warnings.formatwarning(UserWarning(text), UserWarning, "a.py", 1))

    before = warnings.formatwarning
    assert main() == 0
    assert shown == ["warning: cut off: \\x1b]0;title\\x07\nsecond line\n"]
    assert warnings.formatwarning is before


def test_a_warning_names_the_user_s_own_line() -> None:
    # What the call shares with other tasks is wrapped by torch.no_grad, whose frame lies between.
    pipeline = LatentDiffusionPipeline.from_pretrained()
    with warnings.catch_warnings(record=True) as found, pytest.raises(UserError, match="output_t"):
        warnings.simplefilter("always")
        pipeline("a", negative_prompt="b", guidance_scale=1, output_type="none")  # type: ignore[arg-type]
    assert [warning.filename for warning in found] == [__file__]
