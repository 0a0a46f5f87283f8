"""A small transformer encoder that classifies token ids, with its hidden states and attention maps to be seen.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762: the encoder, with
normalisation before each block rather than after it, so that it trains from scratch without a warm-up. A layer has the
matrices, and the number of parameters, of BERT's: 7,087,872 at width 768.

Shapes: b samples, t tokens, w width, h heads.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from mpifed.errors import BadInput
from mpifed.models.classifier import Trace, Width
from mpifed.types import PADDING, DataSpec

SPREAD = 0.02
"""Standard deviation of initial weights and embeddings, as BERT's."""


def transformer(
    spec: DataSpec,
    *,
    layers: Width = 4,
    width: Width = 128,
    heads: Width = 4,
    feedforward: Width = 512,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    embeddings: Literal["trained", "frozen"] = "trained",
) -> nn.Module:
    """Token and learned position embeddings, `layers` of attention and feed-forward, the mean over the tokens, a head.

    Parameters: `(vocabulary + tokens) w + layers (4 w^2 + 2 w f + 9 w + f) + 2 w + (w + 1) classes`. `frozen` token
    embeddings are random, a function of the seed, and neither trained, sent nor stored: `vocabulary * w` fewer.
    """
    if not spec.vocabulary:
        raise BadInput(
            f"model.name: 'transformer' needs texts, and this data set has inputs of shape {spec.input_shape} that are "
            "not token ids; choose another model."
        )
    if width % heads:
        raise BadInput(f"model.heads = {heads} does not divide model.width = {width}; choose one that does.")
    return Transformer(spec, layers, width, heads, feedforward, dropout, embeddings == "frozen")


class Transformer(nn.Module):
    """See `transformer`. Input: int64 `[b, length]`, ids 0 after the last token of a text."""

    def __init__(
        self, spec: DataSpec, layers: int, width: int, heads: int, feedforward: int, dropout: float, frozen: bool
    ) -> None:
        super().__init__()
        tokens = torch.randn(spec.vocabulary, width) * SPREAD
        if frozen:
            # Not a frozen parameter, which would travel with the running statistics: every rank can make its own.
            self.register_buffer("tokens", tokens, persistent=False)
        else:
            self.tokens = nn.Parameter(tokens)
        self.positions = nn.Parameter(torch.randn(*spec.input_shape, width) * SPREAD)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, feedforward, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.classes)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=SPREAD)
                nn.init.zeros_(part.bias)

    def features(self, x: Tensor) -> Tensor:
        """Token ids `[b, length]` -> the mean over a text's tokens of the last hidden states, normalised, `[b, w]`."""
        hidden, _, mask = self._layers(x)
        return self._mean(hidden[-1], mask)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids `[b, length]` -> logits `[b, classes]`."""
        return self.head(self.features(x))

    def trace(self, x: Tensor) -> Trace:
        """Token ids `[b, length]` -> logits, hidden states `[b, t, w]` and attention maps `[b, h, t, t]` by layer."""
        hidden, attention, mask = self._layers(x)
        return Trace(self.head(self._mean(hidden[-1], mask)), tuple(hidden), tuple(attention), mask)

    def _layers(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        mask = x != PADDING
        # Positions where the whole batch is padded would cost time and change nothing.
        used = torch.nonzero(mask.any(dim=0))
        longest = int(used[-1]) + 1 if len(used) else 1
        x, mask = x[:, :longest], mask[:, :longest]
        state = self.dropout(functional.embedding(x, self.tokens) + self.positions[:longest])
        hidden, attention = [], []
        for layer in self.layers:
            state, weights = layer(state, mask)
            hidden.append(state)
            attention.append(weights)
        return hidden, attention, mask

    def _mean(self, state: Tensor, mask: Tensor) -> Tensor:
        weights = mask.unsqueeze(-1).to(state.dtype)
        return (self.norm(state) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Layer(nn.Module):
    """Self-attention and a feed-forward net, each added to its input and given it normalised."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        # One matrix each, not one for all three: codecs that work matrix by matrix then see the paper's shapes.
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, feedforward)
        self.down = nn.Linear(feedforward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """State `[b, t, w]`, mask `[b, t]` -> the next state and the attention maps `[b, h, t, t]`."""
        mixed, attention = self._attend(self.norm1(state), mask)
        state = state + self.dropout(mixed)
        wide = functional.gelu(self.up(self.norm2(state)))
        return state + self.dropout(self.down(wide)), attention

    def _attend(self, state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = (self._by_head(part(state)) for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
        # The least number, not minus infinity: a text without any token then has even weights instead of NaN.
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        attention = torch.softmax(scores, dim=-1)
        mixed = self.dropout(attention) @ value
        return self.out(mixed.transpose(1, 2).flatten(2)), attention

    def _by_head(self, x: Tensor) -> Tensor:
        """`[b, t, w]` -> `[b, h, t, w / h]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
