"""Randomness as a function of (seed, purpose, round, client, ...).

So there is nothing to checkpoint, and it is the same on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed from the job's seed and a key such as `("batches", round, client)`."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *key))


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.Generator(np.random.PCG64(derive(seed, *key)))
