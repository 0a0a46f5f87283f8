"""The clients' models at the server, one by one: what an ensemble, and distillation from one, add to an algorithm that
averages models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mpifed.algorithms.base import Absent, ClientContext, Each, Env, Field, Payload, Reply, State, Uploads


def one_by_one(up: Mapping[str, Field], env: Env) -> Mapping[str, Field]:
    """FedAvg's upload with every client's model by itself: `update` and `buffers_update` as `Each`, or, where clients
    keep their running statistics, `buffers`, without which nobody can use their models."""
    fields = dict(up)
    for name in ("update", "buffers_update"):
        if name in fields:
            rule = fields[name].reduce
            fields[name] = replace(fields[name], reduce=Each(getattr(rule, "weights", "uniform")))
    buffers = env.model().buffer_layout
    if buffers.size and "buffers_update" not in fields:
        fields["buffers"] = Field((buffers.size,), layout=buffers)
    return fields


def with_own_buffers(answer: Reply | Absent, down: Payload, ctx: ClientContext) -> Reply | Absent:
    """The reply with the client's running statistics, where they are not part of it already."""
    if isinstance(answer, Absent) or "buffers" in down or not ctx.model.buffers.numel():
        return answer
    return replace(answer, upload=answer.upload | {"buffers": ctx.model.buffers})


def client_models(server: State, uploads: Uploads, env: Env) -> tuple[Tensor, Tensor]:
    """Parameters `[K, d]` and running statistics `[K, b]` of the round's models, in the order of client ids."""
    models = server["model"] + torch.stack(list(uploads.each("update")))
    if "buffers" in server:
        return models, server["buffers"] + torch.stack(list(uploads.each("buffers_update")))
    if env.model().buffer_layout.size:
        return models, torch.stack(list(uploads.each("buffers")))
    return models, torch.empty(len(models), 0, device=models.device)
