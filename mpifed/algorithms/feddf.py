"""FedDF. Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020,
arXiv 2006.07242, Algorithm 1; the baseline FedDFusion of FedGen (arXiv 2105.10056).

A round of FedAvg; then the server distils the ensemble of the round's models into their average, on samples without
labels: those of the job's public set. The target of a sample is the softmax of the mean of the clients' logits, the
loss KL(target || student), the optimiser Adam with a cosine schedule. The paper stops early by accuracy on labelled
validation samples; here by the same KL on a part of the public set that is held out, so that no label is used at all.
What the next round starts from is the student with the least of it, the average itself included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, ClientContext, Env, Field, Payload, Phase, Reply, State, Uploads
from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.teachers import client_models, one_by_one, with_own_buffers
from mpifed.learning.distillation import distil, ensemble_logits

Positive = Annotated[int, Range(ge=1)]


@dataclass(frozen=True)
class FedDF(FedAvg):
    """Server state and downloads are FedAvg's. K clients' models are in the server's memory during its step."""

    needs_public: ClassVar[bool] = True

    steps: Annotated[int, Range(ge=0)] = 10_000
    """Most distillation steps of a round; 0 is FedAvg."""
    batch_size: Annotated[int, Range(ge=2)] = 128
    """Public samples in a step."""
    lr: Annotated[float, Range(gt=0)] = 1e-3
    """Adam's, from which it falls to 0 over `steps` by half a cosine; its moments are new every round."""
    patience: Positive = 1_000
    """Steps without improvement after which the distillation stops."""
    held_out: Annotated[float, Range(gt=0, lt=1)] = 0.1
    """Part of the public set on which improvement is measured, the same in every round."""
    measure_every: Positive = 100
    """Steps between two measurements."""
    batch_norm: Literal["train", "frozen"] = "train"
    """Batch normalisation of the student on public samples: `train` uses the batch's statistics, and moves the running
    ones to those of the public set; `frozen` uses and keeps the averaged ones."""

    def up(self, env: Env) -> Mapping[str, Field]:
        """Every client's model by itself, its running statistics too, also where they are not averaged."""
        return one_by_one(super().up(env), env)

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, answer = super().client(state, down, ctx)
        return state, with_own_buffers(answer, down, ctx)

    def phases(self, env: Env) -> tuple[Phase, ...]:
        down, up = self.down(env), self.up(env)

        def server(server: State, uploads: Uploads, round_: int) -> State:
            averaged = super(FedDF, self).server(server, uploads, round_)
            return self.fuse(env, averaged, client_models(server, uploads, env), round_) if self.steps else averaged

        return (Phase("train", lambda t: down, lambda t: up, self.download, self.client, server),)

    def fuse(self, env: Env, averaged: State, teachers: tuple[Tensor, Tensor], round_: int) -> State:
        """The average, distilled: lines 5 to 9 of Algorithm 1. `teachers`: parameters `[K, d]` and buffers `[K, b]`."""
        public, student = env.public, env.model()
        assert public is not None  # `needs_public`
        held_out = max(1, round(self.held_out * len(public)))
        order = torch.randperm(len(public), generator=env.generator("held-out public samples"))
        random = env.generator("public batches", round_)
        shuffled = order[held_out:][torch.randperm(len(public) - held_out, generator=random)]
        used = shuffled[: self.steps * self.batch_size]  # what the round can get through

        def mean_logits(x: Tensor) -> Tensor:
            return ensemble_logits(student, *teachers, x).mean(dim=0)

        student.load(averaged["model"], averaged.get("buffers", teachers[1].mean(dim=0)))
        student.train(self.batch_norm == "train")
        distil(
            student,
            mean_logits,
            public.x,
            used,
            order[:held_out],
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            patience=self.patience,
            measure_every=self.measure_every,
            random=random,
        )
        fused = {"model": student.parameters.detach().clone()}
        return averaged | fused | ({"buffers": student.buffers.clone()} if "buffers" in averaged else {})
