"""What steers a denoiser: functions that wrap one (x_t, t) → x_0 in another.

Samplers know nothing of it, and wrappers compose.
"""

from latentdiff.diffusion.guidance.cfg import (
    Predict,
    Scale,
    guidance_context,
    guide,
    needs_unconditional,
)

__all__ = ["Predict", "Scale", "guidance_context", "guide", "needs_unconditional"]
