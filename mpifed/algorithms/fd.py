"""FD, federated distillation. Jeong, Oh, Kim, Park, Bennis, Kim: Communication-Efficient On-Device Machine Learning:
Federated Distillation and Augmentation under Non-IID Private Data, 2018, arXiv 1811.11479, Algorithm 1. Also the
baseline FD of Seo, Park, Oh, Bennis, Kim: Federated Knowledge Distillation, 2020, arXiv 2011.02367.

Devices exchange what their models put out, not the models, which may differ. A device averages its softmax outputs by
the label of the sample while it trains and uploads that table, L x L numbers. The server gives every device, label by
label, the mean of the other devices' rows; in the next round the device adds to the loss of a sample of label l its
cross-entropy to row l. FAug, the paper's augmentation, is `mpifed.algorithms.faug`.

The paper does not say what becomes of a label that some device has no sample of. `variant = "paper"` is its formula to
the letter, which divides by M - 1 whoever holds the label, and sends no counts; `"recommended"` divides by the other
holders, and sends the counts that tell them. Round 1 has no teacher, and a device that is absent keeps its last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Range
from torch import Tensor

from mpifed.algorithms.base import Absent, Algorithm, ClientContext, Env, Field, Payload, Phase, Reply, State, Uploads
from mpifed.learning.label_outputs import Divergence, LabelOutputs, Output, Teacher, distilled, row_means
from mpifed.learning.local import local_training


@dataclass(frozen=True)
class FD(Algorithm):
    """Client state: `model` `[d]`, `buffers` `[b]`; once taught, `teacher` `[L, L]` and `holders` int32 `[L]`, how many
    others stand behind each of its rows. The server keeps nothing from round to round."""

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "clients"
    stateful: ClassVar[bool] = True

    variant: Literal["recommended", "paper"] = "recommended"
    """Sets `denominator` and `counts` where they are not given."""
    weight: Annotated[float, Range(ge=0)] = 1.0
    """gamma, the weight of the distillation. The paper does not give its value; 0 is training alone."""
    average: Output = "probs"
    """What is averaged: `probs`, softmax outputs (the paper), or raw `logits`, turned into a target by a softmax."""
    teacher: Literal["leave_one_out", "global_mean"] = "leave_one_out"
    """The mean of the others (the paper), or of all devices, oneself included (most re-implementations)."""
    denominator: Literal["holders", "m_minus_1"] | None = None
    """`holders` (recommended): a row is the mean over the others that hold the label, and there is none where nobody
    does. `m_minus_1` (paper): the sum over the M - 1 others (of M with `global_mean`), whoever holds it."""
    weighting: Literal["uniform", "count"] = "uniform"
    """Devices count equally (the paper), or by their numbers of samples of the label."""
    loss: Divergence = "ce"
    """Cross-entropy (the paper), `kl` of the same gradient, or `mse`: half the squared distance of what is averaged."""
    exchange: Literal["unicast", "broadcast"] = "unicast"
    """Every device is sent its own table (the paper); or all are sent the sums, and take off their own part, of which
    they have to know that it arrived."""
    counts: bool | None = None
    """Whether counts travel beside the tables, 4 L bytes each way (recommended), or not (paper). Without them a row of
    zeros says that there is no sample, or no teacher, which no row of probabilities, whose sum is 1, can be."""

    @property
    def holders_only(self) -> bool:
        return (self.denominator or ("holders" if self.variant == "recommended" else "m_minus_1")) == "holders"

    @property
    def sends_counts(self) -> bool:
        return self.variant == "recommended" if self.counts is None else self.counts

    @property
    def leaves_one_out(self) -> bool:
        return self.teacher == "leave_one_out"

    @property
    def broadcasts_sums(self) -> bool:
        return self.leaves_one_out and self.exchange == "broadcast"

    def check(self, local: object) -> None:
        if self.average == "logits" and not self.sends_counts:
            raise ValueError("counts: a row of zeros may be a mean of logits; set counts = true, or average = probs")
        if self.loss == "mse" and not (self.sends_counts or self.holders_only):
            raise ValueError("loss: mse with m_minus_1 takes a row of zeros for no teacher; set counts = true")
        if self.weighting == "count" and not (self.sends_counts and self.holders_only):
            raise ValueError("weighting: count needs counts = true and denominator = holders")

    def phases(self, env: Env) -> tuple[Phase, ...]:
        """Devices train and upload; then they are taught, which counts as part of the same round, as in the paper."""
        table, row = (env.spec.classes, env.spec.classes), (env.spec.classes,)
        counts = {"counts": Field(row, torch.int32)} if self.sends_counts else {}
        up = {"outputs": Field(table)} | counts
        if self.broadcasts_sums:
            down = {"sums": Field(table), "totals": Field(row, torch.int32)}
        else:
            to: Literal["each", "participants"] = "each" if self.leaves_one_out else "participants"
            down = {"teacher": Field(table, to=to)}
            down |= {"holders": Field(row, torch.int32, to=to)} if self.sends_counts else {}

        def download(server: State, round_: int) -> Payload:
            return {name: server[name] for name in down}

        nothing: Mapping[str, Field] = {}
        return (
            Phase("train", lambda t: nothing, lambda t: up, self.download, self.client, partial(self.ensemble, env)),
            Phase("teach", lambda t: down, lambda t: nothing, download, self.learn, lambda server, uploads, t: {}),
        )

    # --- device: train ------------------------------------------------------------------------------------------------
    def client_init(self, env: Env, client: int) -> State:
        parameters, buffers = env.initial(client)
        return {"model": parameters, "buffers": buffers}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        seen = LabelOutputs.none_yet(self.average, ctx.env.spec.classes, ctx.y.device)
        teacher = Teacher(state["teacher"], state["holders"] > 0) if "teacher" in state else None
        ctx.model.load(state["model"], state["buffers"])
        local_training(ctx, loss=distilled(seen, teacher, self.weight, self.loss))
        upload = {"outputs": seen.mean()}
        if self.sends_counts:
            upload["counts"] = seen.counts.to(torch.int32)
        state = state | {"model": ctx.model.parameters.detach().clone(), "buffers": ctx.model.buffers.clone()}
        # Its own part of the sums, to be taken off them.
        return state | (upload if self.broadcasts_sums else {}), Reply(upload)

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        """A device's own part of the sums is what the server received."""
        return after | sent if self.broadcasts_sums else after

    # --- server -------------------------------------------------------------------------------------------------------
    def part(self, outputs: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """A device's part of the sums, float32 `[..., L, L]`, and of the totals that divide them, int32 `[..., L]`."""
        if not self.holders_only:
            share = torch.ones_like(outputs[..., 0], dtype=torch.int32)
        elif counts is None:
            share = (outputs.sum(dim=-1) > 0.5).to(torch.int32)
        else:
            share = counts if self.weighting == "count" else (counts > 0).to(torch.int32)
        return outputs * share.unsqueeze(-1), share

    def ensemble(self, env: Env, server: State, uploads: Uploads, round_: int) -> State:
        """The sums over the devices that answered, or what each device of the federation makes of them."""
        counts = torch.stack(list(uploads.each("counts"))) if self.sends_counts else None
        own, share = self.part(torch.stack(list(uploads.each("outputs"))), counts)
        sums, totals = own.double().sum(dim=0).float(), share.sum(dim=0, dtype=torch.int32)
        if self.broadcasts_sums:
            return {"sums": sums, "totals": totals}
        if not self.leaves_one_out:
            return {"teacher": row_means(sums, totals), "holders": totals}
        every_own, every_share = sums.new_zeros(env.clients, *sums.shape), totals.new_zeros(env.clients, *totals.shape)
        answered = torch.tensor(uploads.clients, device=sums.device)
        every_own[answered], every_share[answered] = own, share
        return leave_one_out(sums, totals, every_own, every_share)

    # --- device: be taught --------------------------------------------------------------------------------------------
    def learn(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        if self.broadcasts_sums:
            if "outputs" in state:
                own, share = self.part(state["outputs"], state.get("counts"))
            else:  # its upload did not arrive
                own, share = torch.zeros_like(down["sums"]), torch.zeros_like(down["totals"])
            taught = leave_one_out(down["sums"], down["totals"], own, share)
        else:
            known = (down["teacher"] != 0).any(dim=1).to(torch.int32)
            taught = {"teacher": down["teacher"], "holders": down.get("holders", known)}
        return {"model": state["model"], "buffers": state["buffers"]} | taught, Reply({})

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        return state["model"], state["buffers"]


def leave_one_out(sums: Tensor, totals: Tensor, own: Tensor, share: Tensor) -> State:
    """`teacher` `[..., L, L]` and `holders` `[..., L]`: the means of all without one's own part."""
    others = totals - share
    return {"teacher": row_means(sums - own, others), "holders": others}
