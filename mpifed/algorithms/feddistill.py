"""FedDistill and FedDistill+, the baselines of FedGen. Zhu, Hong, Zhou: Data-Free Knowledge Distillation for
Heterogeneous Federated Learning, ICML 2021, arXiv 2105.10056; as in the authors' code (`FedDistill`, `FedDistill-FL`).

FD (`mpifed.algorithms.fd`) with other choices: clients average raw logits by label; the server sends the mean of all
clients, each included, at the beginning of a round; the loss is cross-entropy plus KL(softmax(row of the label) || p)
from the second round on. FedDistill shares nothing else, and each client uses its own model; FedDistill+ averages the
parameters as FedAvg does as well.

`variant = "official"` is the authors' code: a client's averages are of all its rounds, counts begin at one, and rows of
zeros from clients without a label dilute its mean. `"recommended"` averages the round's outputs over the clients that
have the label, whose counts then travel. (The authors keep the autograd graph of all logits, to no effect. A 2024 paper
of the same name is another method.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Env, Field, Payload, Phase, Reply, State, Uploads
from mpifed.algorithms.fedavg import FedAvg
from mpifed.learning.label_outputs import LabelOutputs, Teacher, distilled, row_means
from mpifed.learning.local import Loss, local_training


@dataclass(frozen=True)
class FedDistill(Algorithm):
    """Server state: after round 1 `logits` `[L, L]`, and `holders` int32 `[L]`, how many clients stand behind a row.
    Client state: `model` `[d]`, `buffers` `[b]`, and `sums` `[L, L]` and `counts` `[L]` of all its rounds."""

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "clients"
    stateful: ClassVar[bool] = True

    variant: Literal["official", "recommended"] = "official"
    """Sets the switches that are not given."""
    weight: Annotated[float, Range(ge=0)] = 1.0
    """Weight of the distillation, 1 in the authors' code."""
    memory: Literal["run", "round"] | None = None
    """A client's averages are of all its rounds so far (official), or of the round (recommended)."""
    first_count: Annotated[int, Range(ge=0)] | None = None
    """Where counts begin: 1 (official), which pulls rare labels' logits towards zero, or 0 (recommended)."""
    denominator: Literal["clients", "holders"] | None = None
    """The mean over all clients of the round (official), or over those with the label (recommended): then counts
    travel, 4 L bytes each way, and a label that nobody had is not distilled."""

    @property
    def keeps_sums(self) -> bool:
        return (self.memory or ("run" if self.variant == "official" else "round")) == "run"

    @property
    def holders_only(self) -> bool:
        return (self.denominator or ("clients" if self.variant == "official" else "holders")) == "holders"

    @property
    def begins_at(self) -> int:
        return int(self.variant == "official") if self.first_count is None else self.first_count

    # --- what crosses the network -------------------------------------------------------------------------------------
    def down(self, env: Env) -> Mapping[str, Field]:
        counts = {"holders": Field((env.spec.classes,), torch.int32)} if self.holders_only else {}
        return {"logits": Field((env.spec.classes, env.spec.classes))} | counts

    def up(self, env: Env) -> Mapping[str, Field]:
        counts = {"counts": Field((env.spec.classes,), torch.int32)} if self.holders_only else {}
        return {"logits": Field((env.spec.classes, env.spec.classes))} | counts

    def phases(self, env: Env) -> tuple[Phase, ...]:
        """There are no logits to send in round 1."""
        up, down = self.up(env), self.down(env)
        first = {name: declared for name, declared in down.items() if name not in ("logits", "holders")}
        return (
            Phase("train", lambda t: down if t > 1 else first, lambda t: up, self.download, self.client, self.server),
        )

    # --- server: send -------------------------------------------------------------------------------------------------
    def download(self, server: State, round_: int) -> Payload:
        return {name: server[name] for name in ("logits", "holders") if name in server}

    # --- client -------------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        parameters, buffers = env.initial(client)
        return {"model": parameters, "buffers": buffers}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        seen, loss = self.distilled(state, down, ctx)
        ctx.model.load(state["model"], state["buffers"])
        local_training(ctx, loss=loss)
        state = {"model": ctx.model.parameters.detach().clone(), "buffers": ctx.model.buffers.clone()}
        return state | self.remembered(seen), Reply(self.averages(seen))

    def distilled(self, state: State, down: Payload, ctx: ClientContext) -> tuple[LabelOutputs, Loss]:
        """The client's sums, which go on while it trains, and its loss."""
        seen = LabelOutputs.none_yet("logits", ctx.env.spec.classes, ctx.y.device)
        if "sums" in state:
            seen = LabelOutputs("logits", state["sums"], state["counts"])
        teacher = None
        if "logits" in down:
            holders = down.get("holders", torch.ones_like(ctx.label_counts).to(ctx.y.device))
            teacher = Teacher(down["logits"], holders > 0)
        return seen, distilled(seen, teacher, self.weight, "kl")

    def remembered(self, seen: LabelOutputs) -> State:
        return {"sums": seen.sums, "counts": seen.counts} if self.keeps_sums else {}

    def averages(self, seen: LabelOutputs) -> Payload:
        counts = {"counts": seen.counts.to(torch.int32)} if self.holders_only else {}
        return {"logits": seen.mean(self.begins_at)} | counts

    # --- server: receive ----------------------------------------------------------------------------------------------
    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        rows = torch.stack(list(uploads.each("logits")))
        if not self.holders_only:
            return server | {"logits": rows.mean(dim=0, dtype=torch.float64).float()}
        holds = torch.stack(list(uploads.each("counts"))) > 0
        sums, holders = (rows * holds.unsqueeze(-1)).sum(dim=0, dtype=torch.float64), holds.sum(dim=0)
        return server | {"logits": row_means(sums, holders).float(), "holders": holders.to(torch.int32)}

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return state["model"], state["buffers"]


@dataclass(frozen=True)
class FedDistillPlus(FedDistill):
    """FedDistill whose clients train the server's model. Server state: FedAvg's too. Client state: `sums`, `counts`."""

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "server"

    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of a client's model in the mean: its number of samples (the authors' code), or equal."""

    @property
    def average(self) -> FedAvg:
        return FedAvg(weighting=self.weighting)

    def down(self, env: Env) -> Mapping[str, Field]:
        return {**self.average.down(env), **super().down(env)}

    def up(self, env: Env) -> Mapping[str, Field]:
        return {**self.average.up(env), **super().up(env)}

    def server_init(self, env: Env) -> State:
        return self.average.server_init(env)

    def download(self, server: State, round_: int) -> Payload:
        return self.average.download(server, round_) | super().download(server, round_)

    def client_init(self, env: Env, client: int) -> State:
        return {}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        seen, loss = self.distilled(state, down, ctx)
        state, _ = self.average.train(state, down, ctx, loss=loss)
        upload = self.average.update(down, ctx) | self.averages(seen)
        return state | self.remembered(seen), Reply(upload, weight=ctx.examples)

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        return super().server(self.average.server(server, uploads, round_), uploads, round_)

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor]:
        return self.average.predictor(server, env)
