"""Keras' defaults, for models whose authors relied on them: initial weights and batch normalisation.

PyTorch's own differ: layers start from a narrower distribution with random biases, batch normalisation has
eps 1e-5 and replaces a tenth of its running statistics by every batch.
"""

from __future__ import annotations

from torch import nn

EPSILON = 1e-3
MOMENTUM = 0.01
"""The share of a batch in the running statistics of batch normalisation: 1 - 0.99, Keras' own momentum."""


def initialise(module: nn.Module) -> nn.Module:
    """`module` with Keras' initial weights: Glorot-uniform kernels, no bias, embeddings uniform in +-0.05."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.uniform_(part.weight, -0.05, 0.05)
    return module
