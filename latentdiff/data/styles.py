"""Picture treatments that make a style word checkable: what the caption says is what was done.

A treatment takes the drawing as RGBA (H, W, 4) and the paper (H, W, 3), values in [0, 1], and
returns the picture (H, W, 3). The set is small on purpose, so that a model can learn all of it and
a reader can check it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Picture = NDArray[np.float32]
#: Part of every cache key; raise it whenever a treatment changes what is drawn.
STYLE_VERSION = 1
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

#: Paper colours by the word that captions use; "white" is the unnamed default.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (214, 62, 62),
    "orange": (245, 150, 50),
    "yellow": (250, 222, 90),
    "green": (92, 178, 96),
    "blue": (74, 134, 228),
    "purple": (150, 92, 198),
    "pink": (248, 168, 200),
    "black": (28, 28, 32),
}


def _box_sums(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Sum over every (radius+1)² window, by its top-left pixel, from one integral image."""
    side = radius + 1
    integral = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    return (
        integral[side:, side:]
        - integral[:-side, side:]
        - integral[side:, :-side]
        + integral[:-side, :-side]
    )


def kuwahara(picture: Picture, radius: int) -> Picture:
    """Smooth like a brush: each pixel takes the mean of its least varied quadrant.

    Source: Kuwahara et al. 1976, "Processing of RI-angiocardiographic images".
    """
    height, width, _ = picture.shape
    padded = np.pad(
        picture.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), "edge"
    )
    count = (radius + 1) ** 2
    mean = _box_sums(padded, radius) / count
    variance = (_box_sums(padded**2, radius) / count - mean**2).sum(2)
    corners = [(dy, dx) for dy in (0, radius) for dx in (0, radius)]
    means = np.stack([mean[y : y + height, x : x + width] for y, x in corners])
    spreads = np.stack([variance[y : y + height, x : x + width] for y, x in corners])
    best = spreads.argmin(0)[None, ..., None]
    return np.take_along_axis(means, best, 0)[0].astype(np.float32)


def over(drawing: Picture, paper: Picture) -> Picture:
    """Composite an RGBA drawing (H, W, 4) over opaque paper (H, W, 3)."""
    return drawing[..., :3] * drawing[..., 3:] + paper * (1 - drawing[..., 3:])


def painting(drawing: Picture, paper: Picture) -> Picture:
    """Oil on canvas: Kuwahara smoothing, richer colour, soft diagonal strokes."""
    side = drawing.shape[0]
    smooth = kuwahara(over(drawing, paper), max(2, side // 20))
    grey = smooth.mean(2, keepdims=True)
    y, x = np.mgrid[:side, :side] / side
    strokes = 0.045 * np.sin(2 * np.pi * (7 * x + 5 * y)) - 0.035
    return np.clip(grey + 1.25 * (smooth - grey) + strokes[..., None], 0, 1).astype(np.float32)


def pencil_sketch(drawing: Picture, paper: Picture) -> Picture:
    """Graphite on the paper's colour (white chalk on black): outlines and light shading."""
    side = drawing.shape[0]
    values = over(drawing, np.ones_like(paper)) @ _LUMA
    grey = Image.fromarray(np.uint8(values * 255))
    around = np.asarray(grey.filter(ImageFilter.GaussianBlur(side / 24)), np.float32) / 255
    lines = np.clip(1 - 2.2 * np.clip(around - values, 0, 1), 0.08, 1)
    tone = (lines * (1 - 0.22 * (1 - values)))[..., None]
    if float(paper.mean()) < 0.3:
        return np.clip(paper + 0.85 * (1 - tone), 0, 1).astype(np.float32)
    return paper * tone


def pixel_art(drawing: Picture, paper: Picture) -> Picture:
    """A 16×16 grid of flat squares with hard edges."""
    side = drawing.shape[0]
    image = Image.fromarray(np.uint8(drawing * 255), "RGBA").convert("RGBa")
    small = image.resize((16, 16), Image.Resampling.BOX).convert("RGBA")
    blocks = small.resize((side, side), Image.Resampling.NEAREST)
    values = np.asarray(blocks, np.float32) / 255
    return np.where(values[..., 3:] > 0.4, values[..., :3], paper)


#: style word → treatment(drawing (H, W, 4), paper (H, W, 3)) -> picture (H, W, 3), all in [0, 1].
STYLES: dict[str, Callable[[Picture, Picture], Picture]] = {
    "plain": over,
    "painting": painting,
    "pencil sketch": pencil_sketch,
    "pixel art": pixel_art,
}


def render(placed: Image.Image, style: str, background: str) -> Image.Image:
    """Draw a placed drawing (see `place`) in a style on a coloured ground.

    Args:
        placed: RGBA, square.
        style: a word of STYLES.
        background: a word of BACKGROUNDS.
    Returns: an RGB picture of the same size.
    """
    colour = np.asarray(BACKGROUNDS[background], np.float32) / np.float32(255)
    drawing = np.asarray(placed, np.float32) / np.float32(255)
    paper = np.broadcast_to(colour, (*drawing.shape[:2], 3))
    treated = STYLES[style](drawing, paper)
    return Image.fromarray(np.round(treated * 255).astype(np.uint8))


def place(drawing: Image.Image, size: int, margin: float = 0.06) -> Image.Image:
    """Scale a drawing into a transparent square with a margin on each side (share of the side).

    Resizing is done by premultiplied alpha, so that hidden colours do not bleed at the edges.
    """
    room = round(size * (1 - 2 * margin))
    scale = room / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    premultiplied = drawing.convert("RGBA").convert("RGBa")
    resized = premultiplied.resize(
        (width, height),
        Image.Resampling.BOX if scale < 0.125 else Image.Resampling.LANCZOS,
        reducing_gap=3.0,
    )
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(resized.convert("RGBA"), ((size - width) // 2, (size - height) // 2))
    return canvas
