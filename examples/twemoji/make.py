"""Write this folder's images and metadata.jsonl from the npm package @iconify-json/twemoji.

npm pack @iconify-json/twemoji@1.2.5 && tar xzf iconify-json-twemoji-1.2.5.tgz
pip install pillow resvg-py==0.5.0
python examples/twemoji/make.py package
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

HERE = Path(__file__).resolve().parent
COUNT, SIDE = 200, 128
#: Of the whole side, kept free on each side: objects stand on white with some room around them.
MARGIN = 0.06
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
#: Words of names that are second drawings of one thing, states of one, or no thing.
LEFT_OUT = {"arrival", "banknote", "button", "decreasing", "departure", "done", "face", "foggy"}
LEFT_OUT |= {"increasing", "locked", "mailbox", "medal", "moon", "oclock", "oncoming", "speaker"}
LEFT_OUT |= {"suit", "thirty", "tray", "unlocked"}
#: What takes no article, beside plurals.
UNCOUNTED = {"bacon", "badminton", "bowling", "bread", "broccoli", "butter", "camping", "fire"}
UNCOUNTED |= {
    "fog",
    "garlic",
    "ice",
    "lacrosse",
    "popcorn",
    "rice",
    "salt",
    "soap",
    "sushi",
    "wood",
}


def chosen(categories: dict[str, list[str]]) -> list[str]:
    """The COUNT names of lowest hash among the everyday ones: the others stay unseen."""
    everyday = {
        name
        for category in CATEGORIES
        for name in categories[category]
        if name.count("-") <= 1 and not LEFT_OUT & {*name.split("-")}
    }
    print(f"{COUNT} of {len(everyday)} everyday names")
    return sorted(sorted(everyday, key=lambda n: hashlib.sha256(n.encode()).digest())[:COUNT])


def captions(name: str) -> list[str]:
    """With an article, where it takes one, and without."""
    words = re.sub("(?<=..)-", " ", name)  # a t-rex keeps its hyphen
    if re.search("[^su]s$", words) or words.split()[-1] in UNCOUNTED:
        return [words]
    vowel = words[0] in "aeiou" and not words.startswith(("ewe", "uni"))
    return [f"{'an' if vowel or words.startswith('hour') else 'a'} {words}", words]


def draw(icon: dict[str, Any], side: int) -> Image.Image:
    """Rasterise an icon of the package and centre it on white."""
    box, room = (
        f"0 0 {icon.get('width', 36)} {icon.get('height', 36)}",
        round(side * (1 - 2 * MARGIN)),
    )
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=room, height=room))
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(drawing, ((side - room) // 2, (side - room) // 2))
    return canvas.convert("RGB")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    package = parser.parse_args().package
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))["icons"]
    names = chosen(
        json.loads((package / "metadata.json").read_text(encoding="utf-8"))["categories"]
    )
    rows = []
    for name in names:
        draw(icons[name], SIDE).save(HERE / f"{name}.webp", lossless=True, quality=100, method=6)
        rows.append(json.dumps({"file_name": f"{name}.webp", "text": captions(name)}))
    (HERE / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
