"""The config engine: merging, strictness, and that every mistake is told at once, with its path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from latentdiff.config import describe, load_config, to_dict
from latentdiff.data.source import DataConfig, open_source
from latentdiff.errors import UserError
from latentdiff.plain_yaml import parse_yaml, to_inline, to_yaml
from latentdiff.train.config import TrainConfig


@dataclass(frozen=True)
class Adam:
    kind: Literal["adam"] = "adam"
    """The method."""
    lr: float = 1e-3
    """Step size."""


@dataclass(frozen=True)
class Lion:
    kind: Literal["lion"] = "lion"
    lr: float = 1e-4
    beta: float = 0.5


@dataclass(frozen=True)
class Loop:
    steps: int = 10
    """How many
    steps."""
    name: str | None = None
    prediction: Literal["eps", "v"] = "v"
    sizes: tuple[int, ...] = (1, 2)
    side: int | tuple[int, int] | None = None
    warm: bool = False
    share: Annotated[float, Field(ge=0, le=1)] = 0.5

    def validate(self) -> list[str]:
        return ["steps must be above 0."] if self.steps <= 0 else []


@dataclass(frozen=True)
class Run:
    path: str
    """Required."""
    loop: Loop = Loop(steps=99)
    """The loop."""
    optimizer: Adam | Lion = Adam(lr=7.0)
    spare: Loop | None = None
    removed: ClassVar = {"pack": None, "guide": {"weight": 0, "heads": []}}
    renamed: ClassVar = {"stage": {"steps": "loop.steps", "rate": "optimizer.lr"}}

    def __post_init__(self) -> None:
        if self.loop.steps == 13:
            raise ValueError("13 steps bring bad luck.")


def load(*overrides: str, path: Path | None = None) -> Run:
    return load_config(Run, path, ["path=x", *overrides])


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(*overrides)
    return str(error.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("path: from-file\nloop:\n  name: n\noptimizer:\n  lr: 2\nspare:\n")
    config = load_config(Run, file, ["loop.steps=5", "--loop.sizes=[7]"])
    assert config.path == "from-file"
    assert config.loop == Loop(steps=5, name="n", sizes=(7,))
    assert config.optimizer == Adam(lr=2.0)
    assert config.spare is None


def test_partly_given_section_keeps_the_rest_of_its_default_instance() -> None:
    assert load("loop.name=n").loop == Loop(steps=99, name="n")
    assert load("optimizer.kind=adam").optimizer == Adam(lr=7.0)


def test_kind_chooses_the_variant_with_its_own_defaults() -> None:
    assert load("optimizer.kind=lion", "optimizer.beta=1").optimizer == Lion(beta=1.0)
    assert "optimizer.beta: unknown key" in message("optimizer.beta=1")
    text = message("optimizer.kind=lino")
    assert "optimizer.kind: must be one of adam, lion; got 'lino'. Did you mean 'lion'?" in text
    assert "optimizer.lr: must be a number" in message("optimizer.kind=lion", "optimizer.lr=x")


def test_every_mistake_is_listed_with_its_path() -> None:
    text = message(
        "loop.stepz=3", "loop.steps=abc", "loop.prediction=epz", "loop.sizes=[1,a]", "loop.warm=1",
        "loop.share=2", "spare={steps: x, name: 5, zzz: 1}",
    )  # fmt: skip
    assert "9 problems" in text
    assert "loop.stepz: unknown key (given 3)" in text and "Did you mean 'steps'?" in text
    assert "loop.steps: must be a whole number; got 'abc'." in text
    assert "loop.prediction: must be one of eps, v; got 'epz'. Did you mean 'eps'?" in text
    assert "loop.sizes.1: must be a whole number; got 'a'." in text
    assert "loop.warm: must be true or false; got 1." in text
    assert "loop.share: must be at most 1; got 2." in text
    assert "spare.steps: must be a whole number" in text
    assert "spare.name: must be text" in text and "in quotes" in text
    assert "spare.zzz: unknown key" in text


@pytest.mark.parametrize(
    ("override", "fits"),
    [
        ("optimizer.lr=1", True), ("optimizer.lr=1e-4", True), ("optimizer.lr='1'", False),
        ("loop.steps=1.5", False), ("loop.steps=true", False), ("loop.steps=null", False),
        ("loop.warm=yes", False), ("loop.warm=true", True), ("loop=3", False),
        ("loop.sizes=3", False), ("optimizer=3", False), ("loop.steps.x=1", False),
        ("loop.name=null", True), ("spare=null", True), ("spare={}", True), ("loop.name=[a]", True),
    ],
)  # fmt: skip
def test_strictness(override: str, fits: bool) -> None:
    if fits:
        load(override)
    else:
        assert override.split("=")[0].removesuffix(".x") in message(override)


@pytest.mark.parametrize(
    ("number", "shown"), [(".inf", "inf"), ("-.inf", "-inf"), (".nan", "nan"), ("1e999", "inf")]
)
def test_numbers_are_finite(number: str, shown: str) -> None:
    text = message(f"optimizer.lr={number}", f"spare={{share: {number}}}")
    for key in ("optimizer.lr", "spare.share"):
        assert f"{key}: must be a finite number; got {shown}." in text


def test_text_is_of_whole_characters() -> None:
    text = message(r'spare={name: "\ud83d cat"}')
    assert r"spare.name: holds half of a character (a lone surrogate); got '\ud83d cat'." in text
    assert load(r'loop.name="\U0001F408 cat"').loop.name == "\N{CAT} cat"


def test_text_fields_take_overrides_as_they_are_typed() -> None:
    assert load("loop.name=2024").loop.name == "2024"
    assert load("loop.name=a: b").loop.name == "a: b"
    assert load("loop.name=a=b").loop.name == "a=b"
    assert load("loop.name=[x").loop.name == "[x"


def test_required_and_cross_field_checks_name_their_place() -> None:
    with pytest.raises(UserError, match="path: is required"):
        load_config(Run)
    text = message("loop.steps=0", "spare.steps=-1")
    assert "loop: steps must be above 0." in text and "spare: steps must be above 0." in text
    assert "13 steps bring bad luck." in message("loop.steps=13")


def test_malformed_overrides() -> None:
    assert "must look like section.key=value; got 'loop'" in message("loop")
    assert "not a section" in message("loop.steps=1", "loop.steps.more=2")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "twice.yaml").write_text("path: a\npath: b")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml")
    for name, text in {
        "trian.yaml": "Did you mean 'train.yaml'",
        "train.yaml": "not valid YAML",
        "list.yaml": "must hold",
        "twice.yaml": "stands twice",
        "circle.yaml": "extends itself",
    }.items():
        with pytest.raises(UserError, match=text):
            load_config(Run, tmp_path / name)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 100000 values"),
        (re.sub(r"\[(.+)\]", r"{p: [\1]}", BOMB), "more than 100000 values"),
        ("loop: &a {name: *a}", "alias within what it stands for"),
        ("loop: &a [[1, *a]]", "alias within what it stands for"),
        ("? [a, b]\n: 1", "key must be a word"),
        ("? {a: b}\n: 1", "key must be a word"),
        ("loop: " + "[" * 2000, "nested too deeply"),
        ("loop: {steps: " + "9" * 5000 + "}", "more than 64 bits"),
        ("loop: {steps: -9223372036854775809}", "more than 64 bits"),
        ("loop: {steps: !!int x}", "does not fit its tag"),
        ("loop: {warm: !!bool x}", "does not fit its tag"),
        ("loop: {share: !!float x}", "does not fit its tag"),
        ("loop: !!map [1]", "does not fit its tag"),
        ("path: !!binary aGk=", "binary"),
        ("path: !!set {a}", "set"),
        ("path: !!timestamp 2026-01-01", "timestamp"),
        ("path: !!python/object:os.system x", "python"),
        ("path: a\x1bb", "special characters"),
        ("x: " + "y" * 2**20, "more than 1 MB"),
    ],
)
def test_files_made_to_hurt_end_in_one_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_config(Run, tmp_path / "a.yaml")
    assert "a.yaml" in str(error.value) and len(str(error.value)) < 2000


def test_aliases_stand_for_their_values(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("path: p\nspare: &a {steps: 5}\nloop: *a")
    config = load_config(Run, tmp_path / "a.yaml")
    assert config.spare == config.loop == Loop(steps=5)
    assert parse_yaml("[9223372036854775807, -9223372036854775808]") == [2**63 - 1, -(2**63)]


def test_overrides_made_to_hurt_are_text() -> None:
    for value in ("9" * 5000, "{[a]: b}", "&a [*a]"):
        assert len(message(f"loop.steps={value}")) < 1000
        assert load(f"loop.name={value}").loop.name == value


def test_extends_is_overlaid_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("path: base\nloop: {steps: 3, name: base}\n")
    (tmp_path / "sub" / "own.yaml").write_text("extends: ../base.yaml\nloop: {name: own}\n")
    config = load_config(Run, tmp_path / "sub" / "own.yaml")
    assert (config.path, config.loop.steps, config.loop.name) == ("base", 3, "own")


def test_what_a_run_writes_reads_back_equal(tmp_path: Path) -> None:
    config = load("loop.name=1e-4", "optimizer.kind=lion", "optimizer.lr=1e-5", "spare.steps=3")
    (tmp_path / "out.yaml").write_text(to_yaml(to_dict(config)))
    assert load_config(Run, tmp_path / "out.yaml") == config


@pytest.mark.parametrize(
    "text", ["no", "1e-4", "0123", "12:30", "null", "2026-01-01", "", "~", "a: b"]
)
def test_text_survives_yaml(text: str) -> None:
    assert parse_yaml(to_yaml({"a": text})) == {"a": text}
    assert parse_yaml(to_inline([text])) == [text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.5E3", 1500.0), ("-.5", -0.5), (".inf", float("inf")), ("007", 7),
        ("off", "off"), ("no", "no"), ("12:30", "12:30"), ("2026-01-01", "2026-01-01"), ("", None),
    ],
)  # fmt: skip
def test_yaml_scalars(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_describe_lists_every_key_with_default_and_docstring() -> None:
    text = describe(Run)
    assert "path  (text; required)\n    Required." in text
    assert "loop.steps  (whole number; 99)\n    How many steps." in text
    assert "loop.prediction  (eps|v; v)" in text
    assert "when optimizer.kind=lion:" in text and "optimizer.beta  (number; 0.5)" in text
    assert "loop.sizes  (list of whole number; [1, 2])" in text


def test_data_config_documents_every_field_and_checks_itself() -> None:
    assert load_config(DataConfig) == DataConfig()
    lines = describe(DataConfig).splitlines()
    assert len(lines) == 2 * len(to_dict(DataConfig()))
    for wrong in (["kind=parquet"], ["kind=hub"], ["path=''"]):
        with pytest.raises(UserError, match="path is required for kind"):
            load_config(DataConfig, None, wrong)
    with pytest.raises(UserError, match="Did you mean 'folder'"):
        load_config(DataConfig, None, ["kind=foldr"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1, a]", "loop.side.1: must be a whole number; got 'a'."),
        ("[1]", "loop.side.1: is required (whole number)."),
        ("[1, 2, 3]", "Tuple should have at most 2 items"),
        ("a", "loop.side: must be a whole number or a list of whole number or null; got 'a'."),
    ],
)
def test_a_number_or_a_list_of_numbers(value: str, words: str) -> None:
    assert words in message(f"loop.side={value}")


def test_without_a_path_it_is_the_example_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "birthday-cake.webp" in {open_source(DataConfig()).name(i) for i in range(200)}
    # A configuration saved before the keys of the emoji set were removed.
    saved = ["emoji_variants=12", "emoji_flags=true", "emoji_concepts=[]"]
    saved += ["emoji_compositions=train", "path=a"]
    assert load_config(DataConfig, None, saved) == DataConfig(path="a")
    with pytest.raises(UserError, match="emoji_variants: this option was removed"):
        load_config(DataConfig, None, ["emoji_variants=3"])
    monkeypatch.setattr("latentdiff.data.source.EXAMPLE", tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone, which is taken .*\. Set data.path=FOLDER"):
        load_config(DataConfig)
    assert load_config(DataConfig, None, ["path=a"]).path == "a"


def test_renamed_keys_are_told_their_new_names(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("path: a\nstage:\n  steps: 4\n")
    with pytest.raises(UserError) as refused:
        load_config(Run, file, ["stage.rate=1e-3"])
    assert str(refused.value).splitlines()[1:] == [
        "  stage.steps: is called loop.steps now (given 4).",
        "  stage.rate: is called optimizer.lr now (given 0.001).",
    ]
    assert "\n  stage: unknown key" in message("stage=4")


@pytest.mark.parametrize(
    "off", ["pack: null", "guide:", "guide: {weight: 0.0, heads: [], grid: 4}", "guide: {grid: 4}"]
)
def test_removed_keys_that_were_off_are_passed_over(off: str, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(f"path: a\n{off}\n")
    assert load_config(Run, file) == load_config(Run, overrides=["path=a"])


@pytest.mark.parametrize(
    ("key", "on"),
    [
        ("pack", "a.safetensors"),
        ("guide", "{weight: 0.1}"),
        ("guide", "{heads: [a]}"),
        ("guide", 3),
    ],
)
def test_removed_keys_that_were_on_say_so(key: str, on: object) -> None:
    with pytest.raises(UserError, match=rf"\n  {key}: this option was removed \(given ") as refused:
        load_config(Run, overrides=["path=a", f"{key}={on}"])
    assert len(str(refused.value).splitlines()) == 2


def test_an_earlier_name_of_a_field_is_read_unless_both_are_given() -> None:
    assert load_config(TrainConfig, None, ["validation.pictures=3"]).validation.images == 3
    with pytest.raises(UserError, match=r"validation\.pictures: is called images now"):
        load_config(TrainConfig, None, ["validation.pictures=3", "validation.images=4"])
