"""Random numbers as a function of keys instead of a generator's history.

Every random choice of a training step or of a sampled image is drawn from a generator whose seed is
a hash of names and numbers (the run's seed, the sample's position, what the number is for). So a
resumed run repeats the uninterrupted one, and the noise of a sample does not depend on the batch it
is computed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.host import CUDA


def derive_seed(*keys: int | str) -> int:
    """Return a 63-bit seed that depends on every key and on their order."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed(*keys)`."""
    # CPU generators keep 32 bits of a seed; the hash spreads the keys over all of them.
    return torch.Generator().manual_seed(derive_seed(*keys) & 0xFFFFFFFF)


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device; the processor does not wait for a GPU meanwhile."""
    # The driver has read the CPU's memory before it returns, so nothing can change it too early.
    return value.to(device, non_blocking=device.type == CUDA)


class SampleRandom:
    """Noise for a batch in which sample i has the random stream of `seeds[i]`, whatever its
    neighbours.

    Numbers are drawn on the CPU, so they are the same on every device. With `seeds=None` they come
    from torch's global generator, as in the reference implementation.
    """

    def __init__(
        self, seeds: Sequence[int] | Tensor | None = None, device: torch.device | str = "cpu"
    ):
        self.device = torch.device(device)
        self._generators = None if seeds is None else [generator(int(seed)) for seed in seeds]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal noise of `shape`, whose first dimension is the batch."""
        if self._generators is None:
            return sent(torch.randn(tuple(shape)), self.device)
        assert shape[0] == len(self._generators), (
            f"{shape[0]} samples for {len(self._generators)} seeds"
        )
        drawn = [torch.randn(tuple(shape[1:]), generator=g) for g in self._generators]
        return sent(torch.stack(drawn), self.device)

    def randint(self, high: int, batch: int) -> Tensor:
        """Draw `batch` integers, int64, uniform in [0, high)."""
        if self._generators is None:
            return sent(torch.randint(0, high, (batch,)), self.device)
        assert batch == len(self._generators), f"{batch} samples for {len(self._generators)} seeds"
        drawn = [torch.randint(0, high, (1,), generator=g) for g in self._generators]
        return sent(torch.cat(drawn), self.device)

    def rand(self, batch: int) -> Tensor:
        """Draw `batch` numbers, uniform in [0, 1)."""
        if self._generators is None:
            return sent(torch.rand(batch), self.device)
        assert batch == len(self._generators), f"{batch} samples for {len(self._generators)} seeds"
        drawn = [torch.rand(1, generator=g) for g in self._generators]
        return sent(torch.cat(drawn), self.device)
