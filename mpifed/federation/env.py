"""What every rank knows when a run is set up: models, their initial parameters, randomness by purpose."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mpifed.algorithms.base import Env, Model
from mpifed.errors import BadInput
from mpifed.job import Job
from mpifed.models import build
from mpifed.models.flat import FlatModel
from mpifed.rng import derive, torch_generator
from mpifed.types import DataSpec

RESERVED = ("round", "clients", "replies", "absent", "bytes", "seconds", "open")
"""Names of a metrics row that are not the algorithm's."""


class RunEnv:
    """`Env` of a job (see `mpifed.algorithms.base`): one model instance per architecture on this rank."""

    def __init__(self, job: Job, spec: DataSpec, clients: int, device: torch.device) -> None:
        self.seed = job.seed
        self.rounds = job.rounds
        self.clients = clients
        self.spec = spec
        self.device = device
        self.shared_buffers = job.model.buffers == "average"
        self._job = job
        self._models: dict[str, tuple[FlatModel, Tensor, Tensor]] = {}

    def model(self, client: int | None = None) -> FlatModel:
        return self._instance(client)[0]

    def initial(self, client: int | None = None) -> tuple[Tensor, Tensor]:
        _, parameters, buffers = self._instance(client)
        return parameters.clone(), buffers.clone()

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        return torch_generator(self.seed, purpose, *key)

    def _instance(self, client: int | None) -> tuple[FlatModel, Tensor, Tensor]:
        table = self._job.model
        if table.name not in self._models:
            module = build(table.target, table.parameters, self.spec, derive(self.seed, "model", table.name))
            model = FlatModel(module.to(self.device))
            self._models[table.name] = model, model.parameters.detach().clone(), model.buffers.clone()
        return self._models[table.name]


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The rank's device: with `auto` a GPU where there is one, GPUs dealt to a node's ranks in turn."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput('device: "cuda", but there is no GPU that torch can use here; use auto or cpu')
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Context:
    """`ClientContext` (see `mpifed.algorithms.base`): one client in one phase of one round."""

    def __init__(
        self,
        env: RunEnv,
        client: int,
        round_: int,
        phase: str,
        samples: tuple[Tensor, Tensor],
        mean_examples: float,
        local: Any,
    ) -> None:
        self.env: Env = env
        self.id = client
        self.round = round_
        self.phase = phase
        self.x, self.y = samples
        self.examples = len(self.y)
        self.relative_examples = self.examples / mean_examples
        self.label_counts = torch.bincount(self.y.cpu(), minlength=env.spec.classes)
        self.model: Model = env.model(client)
        self.local = local
        self.logged: dict[str, float] = {}

    def generator(self, purpose: str) -> torch.Generator:
        return torch_generator(self.env.seed, purpose, self.round, self.id)

    def log(self, name: str, value: float) -> None:
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"a number cannot be logged as '{name}': letters, digits, _ and -, and not {RESERVED}")
        self.logged[name] = float(value)

    def owned(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it where it is part of the model's own memory, which the next client overwrites."""
        own = (self.model.parameters, self.model.buffers, self.model.gradient)
        memory = {part.untyped_storage().data_ptr() for part in own}
        return tensor.detach().clone() if tensor.untyped_storage().data_ptr() in memory else tensor.detach()
