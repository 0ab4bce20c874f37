"""The largest picture that is drawn; apart, without imports, so that scripts check before loading.

Memory grows with the pixels in the decoder, and with their square in attention on some machines. A
slip such as 100000 for 1000 would take the whole machine down instead of ending with a message.
"""

from __future__ import annotations

from latentdiff.errors import UserError

#: Height times width; eight times as wide and tall as what Stable Diffusion was trained on.
MAX_PIXELS = 4096 * 4096


def check_pixels(height: int, width: int, name: str = "height x width") -> None:
    """Refuse sizes that no model draws and no memory holds.

    Args:    name: what the caller calls the size.
    Raises:  UserError: a side below 1, or more than `MAX_PIXELS`.
    """
    if min(height, width) < 1:
        raise UserError(f"{name} must be at least 1 in both directions; got {height}x{width}.")
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name} must be at most {MAX_PIXELS:,} pixels in all, such as 4096x4096; got "
            f"{height}x{width}, {height * width:,} pixels. Draw near the size of the training and "
            "enlarge the picture afterwards."
        )
