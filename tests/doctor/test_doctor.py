"""The doctor against damaged files: it ends, names each of them, and changes none."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from damaged import KINDS, encode, sample_image, snapshot, write_damaged, write_special
from PIL import Image

from latentdiff.cli.doctor import main
from latentdiff.data.images import UnreadableImage
from latentdiff.data.quarantine import read_quarantine
from latentdiff.data.source import DataConfig, open_source, problems_of
from latentdiff.doctor.findings import KINDS as FINDINGS
from latentdiff.doctor.records import open_counter


def kinds_by_name(output: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in (output / "findings.jsonl").read_text("utf-8").split("\n"):
        if line:
            entry = json.loads(line)
            found.setdefault(entry["name"], set()).add(entry["kind"])
    return found


def check_damaged(folder: Path, output: Path, count: int) -> dict[str, set[str]]:
    """Make a damaged folder, examine it, and compare with what was put into it."""
    expected = write_damaged(folder, count)
    special = write_special(folder)
    before = snapshot(folder)
    assert main([str(folder), "--output", str(output), "--show", "5"]) == 0
    assert snapshot(folder) == before
    found = kinds_by_name(output)
    missing = {
        name: (kinds, found.get(name))
        for name, kinds in expected.items()
        if kinds and not found.get(name, set()) & set(kinds)
    }
    assert not missing
    assert set(special) <= set(found)
    assert not any(name.startswith("good") for name in found)
    return found


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """100 damaged files, examined: (data, output)."""
    place = tmp_path_factory.mktemp("doctor")
    found = check_damaged(place / "data", place / "output", 100)
    assert set(FINDINGS) - {"small"} <= set.union(*found.values())
    return place / "data", place / "output"


def test_a_hundred_damaged_files_are_all_named(examined: tuple[Path, Path]) -> None:
    _, output = examined
    names = {"report.html", "quarantine.jsonl", "findings.jsonl"}
    assert {file.name for file in output.iterdir()} == names


def test_unreadable_is_what_training_cannot_read(examined: tuple[Path, Path]) -> None:
    data, output = examined
    source = open_source(DataConfig(kind="folder", path=str(data)))
    unreadable = set()
    for i in range(len(source)):
        try:
            source[i]
        except UnreadableImage as error:
            unreadable.add(error.name)
    found = kinds_by_name(output)
    assert {name for name, kinds in found.items() if "unreadable" in kinds} == unreadable
    left_out = {name for name, kinds in found.items() if kinds & {"no-caption", "other"}}
    assert left_out == {name for name, _ in problems_of(source)}


def test_the_list_holds_the_kinds_asked_for(examined: tuple[Path, Path]) -> None:
    data, output = examined
    found = kinds_by_name(output)
    listed = read_quarantine(output / "quarantine.jsonl")
    asked = {"unreadable", "tiny", "duplicate"}
    assert set(listed) == {name for name, kinds in found.items() if kinds & asked}
    config = DataConfig(kind="folder", path=str(data), quarantine=str(output / "quarantine.jsonl"))
    kept = open_source(config)
    assert len(kept) + len(listed) == len(open_source(DataConfig(kind="folder", path=str(data))))
    for i in range(len(kept)):
        assert min(kept[i].image.size) >= 32


def test_after_the_list_nothing_is_left_to_list(
    examined: tuple[Path, Path], tmp_path: Path
) -> None:
    data, output = examined
    again = [str(data), "--output", str(tmp_path / "o"), "--threads", "1"]
    assert main([*again, f"data.quarantine={output / 'quarantine.jsonl'}"]) == 0
    assert read_quarantine(tmp_path / "o" / "quarantine.jsonl") == {}


def test_the_threads_do_not_change_what_is_found(
    examined: tuple[Path, Path], tmp_path: Path
) -> None:
    data, output = examined
    assert main([str(data), "--output", str(tmp_path / "o"), "--threads", "1"]) == 0
    for name in ("findings.jsonl", "quarantine.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (output / name).read_bytes()


def test_the_report_stands_on_its_own(examined: tuple[Path, Path]) -> None:
    text = (examined[1] / "report.html").read_text("utf-8")
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(text)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "object"}
    sources = [a["src"] or "" for _, a in tags if "src" in a]
    assert sources and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    links = [a["href"] or "" for _, a in tags if "href" in a]
    anchors = {a["id"] for _, a in tags if "id" in a}
    assert links and all(link.removeprefix("#") in anchors for link in links)
    assert "&lt;script&gt;" in text and "url(" not in text and "\x1b" not in text
    assert re.search(r'1:1</td><td class="n">\d+', text) and "JPEG CMYK" in text


def test_a_zip_is_examined_in_place(examined: tuple[Path, Path], tmp_path: Path) -> None:
    data, output = examined
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in sorted(data.iterdir()):
            if file.is_file() and file.stat().st_size < 10**8:
                archive.write(file, file.name)
    assert main([str(tmp_path / "d.zip"), "--output", str(tmp_path / "o")]) == 0
    special = ("pipe.", "gone.", "device.", "loop.", "sparse.")
    plain = {n: k for n, k in kinds_by_name(output).items() if not n.startswith(special)}
    zipped = {n: k for n, k in kinds_by_name(tmp_path / "o").items() if not n.startswith(special)}
    assert zipped == plain


def write_good(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for n in range(count):
        (folder / f"{n}.png").write_bytes(encode(sample_image(n), "PNG"))
        (folder / f"{n}.txt").write_text(f"image {n}")
    return folder


def test_nothing_is_said_of_good_images(tmp_path: Path, capsys) -> None:
    folder = write_good(tmp_path / "d")
    assert main([str(folder), "--output", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "findings.jsonl").read_text() == ""
    assert "all is well" in (tmp_path / "o" / "report.html").read_text("utf-8")
    printed = capsys.readouterr().out
    assert "6 images with captions, 6 can be read" in printed and "quarantine  0" in printed


def test_a_text_named_like_an_image_is_called_a_text(tmp_path: Path) -> None:
    folder = write_good(tmp_path / "d", 2)
    (folder / "1.png").write_text("my notes about cats\nand dogs")
    assert main([str(folder), "--output", str(tmp_path / "o")]) == 0
    entry = json.loads((tmp_path / "o" / "findings.jsonl").read_text("utf-8"))
    assert (entry["kind"], entry["name"]) == ("unreadable", "1.png")
    assert entry["reason"] == "not an image but a text file that begins with 'my notes about cats'"


def test_links_masks_and_encodings_are_reported_as_training_reports_them(tmp_path: Path) -> None:
    folder, far = write_good(tmp_path / "d", 4), write_good(tmp_path / "far", 2)
    (folder / "1.txt").write_bytes("café".encode("cp1252"))
    (folder / "2.mask.png").write_bytes(encode(sample_image(2).convert("L"), "PNG"))
    (folder / "9.mask.png").write_bytes(encode(sample_image(9).convert("L"), "PNG"))
    (folder / "far").symlink_to(far)
    (folder / "3.txt").unlink()
    (folder / "3.txt").symlink_to(far / "1.txt")
    (folder / "\x9b31m.heic").write_bytes(b"x")
    expected = {
        "1.png": {"other"}, "9.mask.png": {"other"}, "far": {"other"}, "3.png": {"other"},
        "\x9b31m.heic": {"ignored"},
    }  # fmt: skip
    more = ["data.loss_mask=file", "--similar", "-1"]
    assert main([str(folder), "--output", str(tmp_path / "o"), *more]) == 0
    assert kinds_by_name(tmp_path / "o") == expected
    assert "\x9b" not in (tmp_path / "o" / "findings.jsonl").read_text("utf-8")
    config = DataConfig(kind="folder", path=str(folder), loss_mask="file")
    problems = problems_of(open_source(config))
    lines = (tmp_path / "o" / "findings.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [(e["name"], e["reason"]) for e in found if e["kind"] == "other"] == problems
    more += ["data.follow_links=true", "--quarantine", "none"]
    assert main([str(folder), "--output", str(tmp_path / "o2"), *more]) == 0
    again = {name: {"duplicate"} for name in ("far/0.png", "far/1.png")}
    del expected["far"], expected["3.png"], again["far/1.png"]
    assert kinds_by_name(tmp_path / "o2") == expected | again


def test_masks_that_training_does_not_use_are_called_masks(tmp_path: Path, capsys) -> None:
    folder = write_good(tmp_path / "d", 5)
    for n in range(5):
        (folder / f"{n}.mask.png").write_bytes(encode(sample_image(n).convert("L"), "PNG"))
    assert main([str(folder), "--output", str(tmp_path / "o"), "--similar", "-1"]) == 0
    assert kinds_by_name(tmp_path / "o") == {f"{n}.mask.png": {"other"} for n in range(5)}
    lines = (tmp_path / "o" / "findings.jsonl").read_text("utf-8").splitlines()
    reason = "a mask, which data.loss_mask=file or data.inpaint_mask=true uses"
    assert all(reason in json.loads(line)["reason"] for line in lines)
    words = "5  Other entries left out (left out): 0.mask.png, 1.mask.png, 2.mask.png …"
    assert words in capsys.readouterr().out  # the summary names some
    (folder / "0.mask.txt").write_text("a mask that is trained on")
    source = open_source(DataConfig(kind="folder", path=str(folder)))
    assert "0.mask.png" in [source.name(i) for i in range(len(source))]


def test_a_broken_mask_makes_its_image_unreadable_as_in_training(tmp_path: Path) -> None:
    folder = write_good(tmp_path / "d", 3)
    for n, data in enumerate((b"no image", encode(sample_image(1).convert("L"), "PNG"), b"")):
        (folder / f"{n}.mask.png").write_bytes(data)
    options = ["data.loss_mask=file", "--similar", "-1"]
    assert main([str(folder), "--output", str(tmp_path / "o"), *options]) == 0
    listed = read_quarantine(tmp_path / "o" / "quarantine.jsonl")
    assert list(listed) == ["0.png", "2.png"]
    assert all(reason.startswith("its mask: ") for reason in listed.values())
    source = open_source(DataConfig(kind="folder", path=str(folder), loss_mask="file"))
    for i in (0, 2):
        with pytest.raises(UnreadableImage, match=rf"{i}\.png: its mask: "):
            source[i]
    (folder / "1.mask.png").unlink()
    with pytest.raises(UnreadableImage, match=r"^1\.png: its mask 1\.mask\.png cannot be read"):
        source[1]


def test_captions_are_measured_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    folder = write_good(tmp_path / "d")
    (folder / "2.txt").write_text("short\n" + "a cat and " * 40)
    options = ["--text-encoder", "embedded", "--quarantine", "long-caption"]
    assert main([str(folder), "--output", str(tmp_path / "o"), *options]) == 0
    listed = read_quarantine(tmp_path / "o" / "quarantine.jsonl")
    assert list(listed) == ["2.png"]
    limit = open_counter("embedded", None).limit
    assert re.fullmatch(rf"\d+ tokens, {limit} fit \(1 of 2 captions\)", listed["2.png"])


def test_limits_can_be_moved(tmp_path: Path) -> None:
    folder = write_good(tmp_path / "d")
    Image.open(folder / "0.png").convert("RGB").save(folder / "9.jpg")
    (folder / "9.txt").write_text("again")

    def listed(*options: str) -> dict[str, str]:
        output = tmp_path / "o"
        shutil.rmtree(output, ignore_errors=True)
        assert main([str(folder), "--output", str(output), *options]) == 0
        return read_quarantine(output / "quarantine.jsonl")

    assert listed() == {}
    assert listed("--quarantine", "similar") == {"9.jpg": "looks like 0.png"}
    assert listed("--quarantine", "similar", "--similar", "-1") == {}
    assert len(listed("--tiny", "81")) == 7
    assert listed("data.image_size=162").keys() == listed("--tiny", "81").keys()
    assert listed("--tiny", "81", "--quarantine", "none") == {}


MISTAKES = {
    "--config list.yaml": ["list.yaml: data must hold `key: value` lines; got [1, 2]"],
    "--quarantine similr": ["--quarantine must be one of", "Did you mean 'similar'?"],
    "--threads 0": ["--threads must be at least 1"],
    "--similar 30": ["--similar", "got 30"],
    "--tiny -3": ["--tiny", "got -3"],
    "--text-encoder /nowhere": ["no tokenizer at"],
    "data.captoin_column=x": ["data.captoin_column", "caption_column"],
    "--config nowhere.yaml": ["nowhere.yaml"],
}


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_are_named_and_nothing_is_written(
    options: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder, output = write_good(tmp_path / "d", 1), tmp_path / "o"
    (tmp_path / "list.yaml").write_text("data: [1, 2]")
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), "--output", str(output), *options.split()]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in MISTAKES[options]), error
    assert not output.exists()


def test_data_that_training_refuses_is_refused_in_the_same_words(tmp_path: Path, capsys) -> None:
    for dataset, words in ((tmp_path / "none", "does not exist"), (tmp_path, "no images")):
        assert main([str(dataset), "--output", str(tmp_path / "o")]) == 2
        assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_written_into_the_data(tmp_path: Path, capsys) -> None:
    folder = write_good(tmp_path / "d", 1)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("precious")
    before = snapshot(folder)
    for output, words in ((tmp_path / "o", "thesis.txt"), (folder / "new", "lies in the data set")):
        assert main([str(folder), "--output", str(output)]) == 2
        assert words in capsys.readouterr().err
    assert snapshot(folder) == before and (tmp_path / "o" / "thesis.txt").exists()


def test_the_data_section_of_a_training_is_taken(tmp_path: Path, monkeypatch) -> None:
    folder = write_good(tmp_path / "d", 2)
    (folder / "metadata.csv").write_text("file_name,a,b\n0.png,,x\n1.png,y,\n")
    (tmp_path / "run.yaml").write_text("data: {caption_column: b}\nloop: {max_steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([str(folder), "--config", "run.yaml"]) == 0
    for output in ("runs/doctor-d", "runs/doctor-d-2"):
        assert kinds_by_name(Path(output))["1.png"] == {"no-caption"}
        assert "no-caption" not in kinds_by_name(Path(output)).get("0.png", set())


def test_files_that_training_uses_are_not_called_unused(tmp_path: Path) -> None:
    """Whatever the upper and lower case of their names."""
    folder = tmp_path / "d"
    folder.mkdir()
    for number, name in enumerate(("a.png", "B.PNG", "c.Jpg", "d.png")):
        sample_image(number).save(folder / name)
    for name in ("A.TXT", "b.txt", "c.Jpg.Txt", "d.txt", "e.TXT"):
        (folder / name).write_text("a thing")
    assert main([str(folder), "--output", str(tmp_path / "o")]) == 0
    assert kinds_by_name(tmp_path / "o") == {"e.TXT": {"ignored"}}
    (folder / "Metadata.CSV").write_text("file_name,text\na.png,x\nb.png,x\nC.jpg,x\nd.png,x\n")
    assert main([str(folder), "--output", str(tmp_path / "o2")]) == 0
    texts = ("A.TXT", "b.txt", "c.Jpg.Txt", "d.txt", "e.TXT")
    assert kinds_by_name(tmp_path / "o2") == {name: {"ignored"} for name in texts}


def test_a_table_is_examined_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    good = encode(sample_image(0), "PNG")
    rows = {"image": [good, b"broken", good, None], "text": ["a", "b", "c", "d"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "t.parquet"))
    assert main([str(tmp_path / "t.parquet"), "--output", str(tmp_path / "b")]) == 0
    assert kinds_by_name(tmp_path / "b") == {
        "row 1": {"unreadable"}, "row 2": {"duplicate"}, "row 3": {"unreadable"},
    }  # fmt: skip


def test_a_fault_in_one_image_does_not_end_the_examination(tmp_path: Path, monkeypatch) -> None:
    def fail(image: Image.Image) -> None:
        raise MemoryError("no room")

    folder = write_good(tmp_path / "d", 2)
    monkeypatch.setattr("latentdiff.doctor.records.outline_and_colours", fail)
    assert main([str(folder), "--output", str(tmp_path / "o")]) == 0
    assert "no room" in (tmp_path / "o" / "quarantine.jsonl").read_text()


def test_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "latentdiff", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    unknown = run("doctr")
    assert unknown.returncode == 2 and "doctor; got 'doctr'" in unknown.stderr
    found = run("doctor", "--help")
    assert found.returncode == 0 and "DATASET" in found.stdout and "%" not in found.stdout


def test_the_kinds_are_what_was_asked_for() -> None:
    wanted = {"truncated", "wrong_magic", "zip_bomb", "huge", "empty", "cmyk", "palette"}
    assert wanted | {"animated", "no_caption"} <= set(KINDS)


@pytest.mark.parametrize(
    ("options", "enlarged"),
    [
        ((), {"40x64", "64x40", "16x16", "40x40", "48x80"}),
        (("data.crop=pad",), {"16x16", "40x40"}),
        (("data.buckets=true", "data.bucket_step=16"), {"16x16", "40x40", "40x64", "64x40"}),
        (("data.buckets=true", "data.bucket_step=8", "data.no_upscale=true"), set()),
        (("data.buckets=true", "data.bucket_step=32", "data.no_upscale=true"), {"16x16"}),
    ],
)
def test_images_that_training_enlarges(
    tmp_path: Path, options: tuple[str, ...], enlarged: set[str]
) -> None:
    data = tmp_path / "d"
    data.mkdir()
    sizes = ((40, 64), (64, 40), (16, 16), (40, 40), (64, 64), (48, 80), (100, 70))
    for number, (width, height) in enumerate(sizes):
        sample_image(number, (width, height)).save(data / f"{width}x{height}.png")
        (data / f"{width}x{height}.txt").write_text("a cat")
    words = ["data.image_size=64", *options, "--similar", "-1", "--tiny", "0"]
    assert main([str(data), "--output", str(tmp_path / "o"), *words]) == 0
    found = kinds_by_name(tmp_path / "o")
    names = {name.removesuffix(".png") for name, kinds in found.items() if "small" in kinds}
    assert names == enlarged
