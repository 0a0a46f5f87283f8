"""Transfer learning: what a client does before its first round, where the job has a `[transfer]`.

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", arXiv 1910.03581: every party trains its
model "to convergence" on the public set, with all its labels, and then on its own samples. What that leaves is the
accuracy without collaboration. Epochs, batches, patience and Adam's step size are those of the authors' code
(github.com/diogenes0319/FedMD_clean), which stops when the accuracy on the TEST sets no longer grows. Here the test set
is never looked at: the accuracy on a part of the training samples, set aside for it, says when to stop, and the best
epoch's model is kept; where nothing is set aside (18 samples can spare none), the training loss says it, and the last
epoch's is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpifed.algorithms.base import ClientContext, Model
from mpifed.learning.local import adam_optimizer, one_pass, seed_dropout
from mpifed.learning.scores import scores
from mpifed.types import State


def first_model(ctx: ClientContext) -> State:
    """The model with which a client begins: `model` `[d]`, `buffers` `[b]` and, in `moments`, Adam's where it trained.

    Without a `[transfer]` that is the initial one. With it, logs `baseline_accuracy`, on the whole test set, which is
    what the client reaches without anybody's help; and `public_accuracy`, on the public samples set aside. A function
    of the seed and the client; the public part of the seed and the architecture, so a rank computes it once for all
    clients of one architecture.
    """
    env, table = ctx.env, ctx.env.transfer
    parameters, buffers = env.initial(ctx.id)
    if table is None:
        return {"model": parameters, "buffers": buffers, "moments": {}}
    state = env.once("transfer from the public set", ctx.id, lambda: _on_public_set(ctx))
    if "validation" in state:
        ctx.log("public_accuracy", float(state["validation"]))
    state = _on_own_samples(ctx, state)
    ctx.log("baseline_accuracy", ctx.evaluate(state["model"], state["buffers"])["accuracy"])
    return {name: state[name] for name in ("model", "buffers", "moments")}


@dataclass(frozen=True)
class Stage:
    """One training to convergence: on which samples, for how long, and on whose randomness."""

    x: Callable[[Tensor], Tensor]  # indices int64 [k] -> inputs [k, *input_shape]
    y: Tensor  # int64 [samples]
    epochs: int
    batch_size: int
    validation: float
    patience: int
    min_delta: float
    generator: Callable[[str], torch.Generator]


def _on_public_set(ctx: ClientContext) -> State:
    env, table, public = ctx.env, ctx.env.transfer, ctx.env.public
    start: State = dict(zip(("model", "buffers"), env.initial(ctx.id), strict=True))
    if table.public_epochs == 0:
        return start
    assert public is not None  # the job has been checked for it
    stage = Stage(
        public.x,
        public.labels.to(env.device),
        table.public_epochs,
        table.public_batch_size,
        table.public_validation,
        table.public_patience,
        table.public_min_delta,
        lambda purpose: env.generator(f"public transfer {purpose}"),
    )
    trained = to_convergence(ctx.model, start, stage, ctx.local, table.lr)
    return {name: value for name, value in trained.items() if name != "moments"}  # which nobody goes on with


def _on_own_samples(ctx: ClientContext, start: State) -> State:
    """With new moments of Adam, which are those that go on in the rounds."""
    env, table = ctx.env, ctx.env.transfer
    stage = Stage(
        lambda part: ctx.x[part],
        ctx.y,
        table.private_epochs,
        table.private_batch_size,
        table.private_validation,
        table.private_patience,
        table.private_min_delta,
        lambda purpose: env.generator(f"private transfer {purpose}", ctx.id),
    )
    return to_convergence(ctx.model, start, stage, ctx.local, table.lr)


def to_convergence(model: Model, start: State, stage: Stage, local: Any, lr: float) -> State:
    """Train with Adam from `start` (`model`, `buffers`) until the stage's epochs or its patience are over.

    Returns `model`, `buffers`, Adam's `moments`, and, where samples were set aside, the best accuracy on them as
    `validation`. An epoch is progress where that accuracy, or without it the mean training loss, is better than the
    best by more than `min_delta`; `patience` epochs in a row without end the training. Raises FloatingPointError where
    the loss is not finite.
    """
    order = torch.randperm(len(stage.y), generator=stage.generator("validation")).to(stage.y.device)
    aside = min(round(stage.validation * len(stage.y)), len(stage.y) - 1)
    held, rest = order[:aside], order[aside:]
    shuffle = stage.generator("batches")
    model.load(start["model"], start["buffers"])
    optimizer = adam_optimizer(model, local, lr)

    def kept() -> State:
        now = {"model": model.parameters.detach().clone(), "buffers": model.buffers.clone()}
        return now | {"moments": optimizer.state()}

    best, result, waited = -math.inf, kept(), 0
    seed_dropout(stage.generator("dropout"), stage.y.device)
    for _ in range(stage.epochs):
        model.train()
        total, steps = torch.zeros((), dtype=torch.float64, device=stage.y.device), 0
        for picked in one_pass(len(rest), stage.batch_size, shuffle):
            part = rest[picked.to(rest.device)]
            model.drop_gradient()
            loss = functional.cross_entropy(model(stage.x(part)), stage.y[part])
            loss.backward()
            optimizer.step(model.gradients())
            total, steps = total + loss.detach(), steps + 1
        if not math.isfinite(float(total)):
            raise FloatingPointError("the loss of the transfer learning is not finite")
        reached = _accuracy(model, stage, held) if aside else -float(total) / steps
        if reached > best + stage.min_delta:
            best, waited = reached, 0
            if aside:
                result = kept() | {"validation": torch.tensor(reached)}
        else:
            waited += 1
        if waited >= stage.patience:
            break
    return result if aside else kept()


def _accuracy(model: Model, stage: Stage, samples: Tensor) -> float:
    predicted = scores(model, stage.x, samples).argmax(dim=1)
    return float((predicted == stage.y[samples]).double().mean())
