"""Run in a process of its own: how much memory opening a model takes.

python loading_memory.py MODEL DTYPE      prints bytes: before, at the peak, of the weights
"""

from __future__ import annotations

import sys


def resident(what: str) -> int:
    """Bytes of this process in RAM, pages of mapped files that it has read included.

    Args: what: VmRSS for now, VmHWM for the most so far (ru_maxrss would count the parent's).
    """
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def main() -> None:
    """Open the model, use every number of it once, print."""
    import torch

    from latentdiff.formats.model import load_model
    from latentdiff.models import clip_text as clip_text

    torch.nn.Linear(2, 2)(torch.zeros(1, 2))
    before = resident("VmRSS")
    components = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
    weights = 0
    for part in (components.unet, components.autoencoder.module, components.text_encoder.module):
        for tensor in part.state_dict().values():
            weights += tensor.nbytes
            tensor.flatten()[:: 1024 // tensor.itemsize].float().sum()  # touches every page
    print(before, resident("VmHWM"), weights)


if __name__ == "__main__":
    main()
