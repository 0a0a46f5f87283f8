"""Classifiers by name, built as a function of the seed.

A factory is a function `(spec: DataSpec, *, key: type = default, ...) -> nn.Module` from an input's shape to a module
that maps `[batch, *spec.input_shape]` of `spec.dtype` to logits `[batch, spec.classes]`. Its annotated keywords are the
keys of the job's `[model]` table. A factory of one's own is named by its import path, `"package.module:function"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any

import torch
from torch import nn

from mpifed.errors import BadInput
from mpifed.types import DataSpec

MODELS: dict[str, str] = {
    "linear": "mpifed.models.dense:linear",
    "mlp": "mpifed.models.dense:mlp",
    "2nn": "mpifed.models.dense:two_nn",
    "cnn": "mpifed.models.convolutional:cnn",
    "feddyn_cnn": "mpifed.models.convolutional:feddyn_cnn",
    "fedgen_net": "mpifed.models.convolutional:fedgen_net",
    "fedmd_cnn": "mpifed.models.fedmd:fedmd_cnn",
    "fd_cnn": "mpifed.models.convolutional:fd_cnn",
    "resnet18": "mpifed.models.resnet:resnet18",
    "transformer": "mpifed.models.text:transformer",
}
"""Name in a job -> where the factory is, `"module:function"`; nothing is imported before it is asked for."""


_GLOBAL_GENERATOR = RLock()
"""Held while torch's global generator is another one for a moment: ranks may be threads of one process."""


def initialise(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`factory()` with initial parameters that depend on `seed` alone; torch's global generator is left as it was.

    The module is built on the CPU, so that it starts alike on every device.
    """
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would seed the accelerators' generators too.
        torch.default_generator.manual_seed(seed)
        return factory()


def build(factory: Callable[..., nn.Module], keys: Mapping[str, Any], spec: DataSpec, seed: int) -> nn.Module:
    """`factory(spec, **keys)` with initial parameters from `seed`, tried once on a sample of zeros.

    Raises `BadInput` where the module does not map `[1, *spec.input_shape]` to `[1, spec.classes]`.
    """
    target = f"{factory.__module__}:{factory.__qualname__}"
    name = next((name for name, known in MODELS.items() if known == target), target)
    module = initialise(lambda: factory(spec, **keys), seed)
    if not isinstance(module, nn.Module):
        raise BadInput(f"model.name: '{name}' returned a {type(module).__name__}; a factory returns a torch.nn.Module.")
    logits = probe(module, spec.input_shape, name, spec.dtype)
    if logits != (spec.classes,):
        raise BadInput(
            f"model.name: '{name}' answers an input of shape {spec.input_shape} with an output of shape {logits}; "
            f"make it ({spec.classes},), one logit a class."
        )
    return module


def probe(
    module: nn.Module, input_shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float32
) -> tuple[int, ...]:
    """The shape of `module`'s output for one sample of zeros, without the batch; the module is unchanged by it.

    Raises `BadInput`, naming the model and the shape, where the module cannot take such an input.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
            return tuple(module(torch.zeros(1, *input_shape, dtype=dtype)).shape[1:])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise BadInput(
            f"model.name: '{name}' cannot take inputs of shape {input_shape} ({reason}); choose another model, or its "
            "keys, for this data set."
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training
