"""Memory of Stable Diffusion's autoencoder at 2048×2048, whole and in bands of rows.

    python benchmarks/vae_memory.py [--size 2048] [--output FILE.json]

Counts the bytes of all tensors that are alive, weights included, while the network runs on tensors
without content: the same on any machine, without its time. What a kernel takes for itself comes on
top. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.formats.sd_facts import sd_configuration
from latentdiff.models import bands
from latentdiff.models.vae import AutoencoderKL


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that tensors made under it have, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._users.get(key):
            self.now += size
            self.most = max(self.most, self.now)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= size


def measure(size: int = 2048) -> dict[str, Any]:
    """Peak in GB by half of the network and way."""
    found: dict[str, Any] = {}
    with FakeTensorMode(), torch.no_grad():
        network = AutoencoderKL(sd_configuration("1", "eps")["vae"]).eval()
        weights = sum(p.nbytes for p in network.parameters())
        for half, shape in (("decode", (4, size // 8, size // 8)), ("encode", (3, size, size))):
            for way, owner in (("whole", network), ("bands", bands)):
                given = (network,) if owner is bands else ()
                with LiveBytes() as live:
                    getattr(owner, half)(*given, torch.empty(1, *shape))
                found[f"{half} {size}x{size} {way}, GB"] = round((live.most + weights) / 1e9, 2)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    text = json.dumps(measure(args.size), indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
