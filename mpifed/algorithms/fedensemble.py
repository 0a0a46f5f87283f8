"""FedEnsemble, the baseline of Zhu, Hong, Zhou, ICML 2021, arXiv 2105.10056: trained as FedAvg, and where a prediction
is asked for, the mean of the logits of all clients' models.

As in the authors' code (github.com/zhuangdizhu/FedGen), clients that did not take part in the last round count as well,
each with the model that was sent in it; `inactive = "left_out"` is an ensemble of the round's models alone. The code
tests the pooled test samples of the clients, here it is the whole test set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mpifed.algorithms.base import (
    Absent,
    ClientContext,
    Ensemble,
    Env,
    Field,
    Payload,
    Phase,
    Reply,
    State,
    Uploads,
)
from mpifed.algorithms.fedavg import FedAvg
from mpifed.algorithms.teachers import client_models, one_by_one, with_own_buffers


@dataclass(frozen=True)
class FedEnsemble(FedAvg):
    """Server state: FedAvg's; `members` `[K, d]`, the models of the K clients of the last round, `member_buffers`
    `[K, b]`; `sent` and `sent_buffers`, what they were sent. So K + 2 models in the server's memory and checkpoint."""

    inactive: Literal["sent", "left_out"] = "sent"
    """Clients that were not asked in the last round count with the model that was sent in it (authors' code), or do not
    count."""

    def up(self, env: Env) -> Mapping[str, Field]:
        """Every client's model by itself, its running statistics too, also where they are not averaged."""
        return one_by_one(super().up(env), env)

    def phases(self, env: Env) -> tuple[Phase, ...]:
        down, up = self.down(env), self.up(env)

        def server(server: State, uploads: Uploads, round_: int) -> State:
            members, buffers = client_models(server, uploads, env)
            was = {"sent": server["model"], "sent_buffers": server.get("buffers", buffers.mean(dim=0))}
            return super(FedEnsemble, self).server(server, uploads, round_) | {
                "members": members,
                "member_buffers": buffers,
                **was,
            }

        return (Phase("train", lambda t: down, lambda t: up, self.download, self.client, server),)

    def server_init(self, env: Env) -> State:
        server = super().server_init(env)
        parameters, buffers = env.initial()
        return server | {
            "clients": torch.tensor(env.clients),
            "members": parameters[None],
            "member_buffers": buffers[None],
            "sent": parameters,
            "sent_buffers": buffers,
        }

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        state, answer = super().client(state, down, ctx)
        return state, with_own_buffers(answer, down, ctx)

    def predictor(self, server: State, env: Env) -> Ensemble:  # type: ignore[override]
        members = list(zip(server["members"], server["member_buffers"], strict=True))
        weights = [1.0] * len(members)
        others = int(server["clients"]) - len(members)
        if self.inactive == "sent" and others:
            members.append((server["sent"], server["sent_buffers"]))
            weights.append(float(others))
        return Ensemble(tuple(members), tuple(weights))
