"""Codecs: how one tensor becomes bytes on its way, and a tensor again. A leaf: it knows tensors and layouts alone."""

from __future__ import annotations

import tomllib
from typing import Any, Protocol

import torch
from torch import Tensor

from mpifed.component import bind, resolve
from mpifed.errors import BadInput
from mpifed.types import Layout, State

CODECS: dict[str, str] = {
    "identity": "mpifed.codecs.identity:Identity",
    "half": "mpifed.codecs.half:Half",
    "svd": "mpifed.codecs.svd:Svd",
    "quantize": "mpifed.codecs.quantize:Quantize",
    "topk": "mpifed.codecs.topk:TopK",
    "powersgd": "mpifed.codecs.powersgd:PowerSgd",
}


class Codec(Protocol):
    """Encodes and decodes; what it must remember from one round to the next (a residual) is explicit, the client's."""

    plain: bool
    """The bytes are the tensor's own, so that a sum of encoded tensors can be taken piece by piece."""

    stateful: bool
    """It remembers something for each client, which then stays on one rank."""

    scheduled: bool
    """What it does depends on the progress, and so on the number of rounds."""

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> int | None:
        """Encoded bytes where the shape alone decides them, else None; then `bounds`, of the same arguments, gives the
        least and the most, where a codec knows them."""

    def encode(
        self, value: Tensor, layout: Layout | None, memory: State, progress: float, seed: int = 0
    ) -> tuple[Tensor, State]:
        """`value` (any shape, on the CPU) -> bytes (uint8, one axis) and the next memory.

        `progress` is round/rounds; `seed` differs from round to round, client to client and field to field.
        """

    def decode(self, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> Tensor:
        """The bytes -> a tensor of that shape and dtype."""


def bounds(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout | None) -> tuple[int, int | None]:
    """The least and the most encoded bytes of a value; None where nothing is known of the most."""
    size = codec.nbytes(shape, dtype, layout)
    if size is not None:
        return size, size
    limits = getattr(codec, "bounds", None)
    return (0, None) if limits is None else limits(shape, dtype, layout)


def parse(text: str, key: str) -> tuple[str, dict[str, Any]]:
    """`"svd(energy=0.95, rank=4)"` -> `("svd", {"energy": 0.95, "rank": 4})`; raises BadInput naming `key`."""
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        if not rest.endswith(")"):
            raise tomllib.TOMLDecodeError("no closing bracket", rest, len(rest))
        return name.strip(), tomllib.loads("parameters = {" + rest[:-1] + "}")["parameters"]
    except tomllib.TOMLDecodeError:
        raise BadInput(f'{key}: "{text}" is not of the form name(key=value, ...)') from None


def make(text: str, key: str) -> Codec:
    """The codec that a job describes as `text`. Raises BadInput naming `key` or `key.parameter`."""
    name, parameters = parse(text, key)
    target = resolve(CODECS, name, key)
    codec: Codec = target(**bind(target, parameters, key))
    return codec
