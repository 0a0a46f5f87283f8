"""The few types that every room shares. A leaf: imports nothing of mpifed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = dict[str, Any]
"""Explicit state of a server or a client: tensors by name, or states by name (`{"base": ..., "generator": ...}`).

Names hold letters, digits, `_`, `-` and `.`; numbers are 0-d tensors; the empty state is `{}`.
"""

Payload: TypeAlias = dict[str, Tensor]
"""What crosses the network in one direction: one tensor per declared field."""


PADDING, UNKNOWN = 0, 1
"""The token ids of a text that are no token of its vocabulary (see `DataSpec`)."""


@dataclass(frozen=True)
class DataSpec:
    """What a model has to know about a data set: the input's shape without the batch, and the number of classes.

    `mean` and `std` (one per channel, in units of the scaled input) standardise `uint8` pixels after division by 255.
    A text is token ids in [0, `vocabulary`), and `input_shape` its number of tokens: id 0 is padding, after the last
    token, and 1 any token that the vocabulary has not. Where samples are no texts, `vocabulary` is 0.
    """

    input_shape: tuple[int, ...]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    vocabulary: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of a model's input: int64 where it is token ids, else float32."""
        return torch.int64 if self.vocabulary else torch.float32

    def standardise(self, x: Tensor) -> Tensor:
        """Stored samples `[n, *input_shape]` (uint8, float32, token ids) -> model input of that shape and `dtype`."""
        if self.vocabulary:
            return x.to(torch.int64)
        if x.dtype != torch.uint8:
            return x.to(torch.float32)
        shape = (1, len(self.mean)) + (1,) * (len(self.input_shape) - 1)
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        return x.to(torch.float32).div_(255.0).sub_(mean).div_(std)

    def pixels(self, x: Tensor) -> Tensor:
        """Model input that was made of uint8 pixels -> these, exactly. Raises ValueError where it was not."""
        shape = (1, len(self.mean)) + (1,) * (len(self.input_shape) - 1)
        mean = torch.tensor(self.mean, device=x.device).view(shape)
        std = torch.tensor(self.std, device=x.device).view(shape)
        values = (x * std + mean) * 255.0
        pixels = values.round()
        if ((values - pixels).abs() > 0.01).any() or (pixels < 0).any() or (pixels > 255).any():
            raise ValueError("the samples are no pixels of 8 bit")
        return pixels.to(torch.uint8)


@dataclass(frozen=True)
class Layout:
    """The named tensors inside one flat vector, in order: `names[i]` has `shapes[i]` and starts at `offsets[i]`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(int(torch.Size(shape).numel()) for shape in self.shapes)

    @property
    def offsets(self) -> tuple[int, ...]:
        total, offsets = 0, []
        for size in self.sizes:
            offsets.append(total)
            total += size
        return tuple(offsets)

    @property
    def size(self) -> int:
        """Elements of the flat vector."""
        return sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """`flat` `[size]` -> its named parts, sharing memory with it."""
        return {
            name: flat[start : start + size].view(shape)
            for name, shape, start, size in zip(self.names, self.shapes, self.offsets, self.sizes, strict=True)
        }


def leaves(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state in order of insertion, each with its path (`base/model`)."""
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, Tensor):
            yield path, value
        else:
            yield from leaves(value, path + "/")


def map_state(function: Callable[[Tensor], Tensor], state: Mapping[str, Any]) -> State:
    """The same state with `function(tensor)` in place of every tensor."""
    return {
        name: function(value) if isinstance(value, Tensor) else map_state(function, value)
        for name, value in state.items()
    }


def nbytes(state: Mapping[str, Any]) -> int:
    """Bytes of all tensors of a state or payload."""
    return sum(tensor.nbytes for _, tensor in leaves(state))
