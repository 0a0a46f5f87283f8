"""What every rank knows when a run is set up: models, their initial parameters, randomness by purpose."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mpifed.algorithms.base import Auxiliary, Env, Model, PublicSet
from mpifed.errors import BadInput
from mpifed.job import Job
from mpifed.models import build, initialise
from mpifed.models.flat import FlatModel
from mpifed.rng import derive, torch_generator
from mpifed.types import DataSpec, State

RESERVED = ("round", "clients", "replies", "absent", "bytes", "seconds", "open")
"""Names of a metrics row that are not the algorithm's."""


class RunEnv:
    """`Env` of a job (see `mpifed.algorithms.base`): one model instance per architecture on this rank."""

    def __init__(
        self, job: Job, spec: DataSpec, clients: int, device: torch.device, public: PublicSet | None = None
    ) -> None:
        self.seed = job.seed
        self.rounds = job.rounds
        self.clients = clients
        self.spec = spec
        self.device = device
        self.shared_buffers = job.model.buffers != "local"
        self.own_buffers = job.model.buffers != "average"
        self.local = job.local
        self.transfer = job.transfer
        self.public = public
        self._job = job
        self._models: dict[tuple[str, int | str], Auxiliary] = {}
        self._computed: dict[tuple[str, str, int], State] = {}

    def model(self, client: int | None = None) -> Model:
        return self._instance(client).model

    def initial(self, client: int | None = None) -> tuple[Tensor, Tensor]:
        _, parameters, buffers = self._instance(client)
        return parameters.clone(), buffers.clone()

    def auxiliary(self, name: str, factory: Callable[[], nn.Module]) -> Auxiliary:
        return self._keep(("auxiliary", name), lambda: initialise(factory, derive(self.seed, "auxiliary", name)))

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        return torch_generator(self.seed, purpose, *key)

    def once(self, purpose: str, client: int, make: Callable[[], State]) -> State:
        key = (purpose, *self._architecture(client))
        if key not in self._computed:
            self._computed[key] = make()
        return self._computed[key]

    def _architecture(self, client: int | None) -> tuple[str, int]:
        """Whose model it is, and its number among those."""
        own = self._job.client_models
        return ("own", client % len(own)) if client is not None and own else ("shared", 0)

    def _instance(self, client: int | None) -> Auxiliary:
        whose, number = self._architecture(client)
        if whose == "shared":
            return self._keep((whose, number), lambda: self._build(self._job.model, "model"))
        own = self._job.client_models[number]
        return self._keep((whose, number), lambda: self._build(own, "client model", number))

    def _build(self, table: Any, *purpose: str | int) -> nn.Module:
        return build(table.target, table.parameters, self.spec, derive(self.seed, *purpose, table.name))

    def _keep(self, key: tuple[str, int | str], make: Callable[[], nn.Module]) -> Auxiliary:
        if key not in self._models:
            model = FlatModel(make().to(self.device))
            self._models[key] = Auxiliary(model, model.parameters.detach().clone(), model.buffers.clone())
        return self._models[key]


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device that this rank would take: with `auto` a GPU where there is one, dealt to a node's ranks in turn."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput('device: "cuda", but there is no GPU that torch can use here; use auto or cpu')
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def identity(device: torch.device) -> str:
    """What tells a node's GPUs apart, whatever each rank may see of them and call them; "" for the CPU."""
    if device.type == "cpu":
        return ""
    properties = torch.cuda.get_device_properties(device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = device.index or 0
    return str(getattr(properties, "uuid", "") or (visible[index] if index < len(visible) else index))


def crowded(hosts: Sequence[str], gpus: Sequence[str]) -> str:
    """What is wrong where several ranks of a node would use one GPU, by host and `identity` of every rank; or ""."""
    for host in dict.fromkeys(hosts):
        used = [gpu for name, gpu in zip(hosts, gpus, strict=True) if name == host and gpu]
        if len(set(used)) < len(used):
            count = len(set(used))
            return f"{len(used)} ranks on {host} have {count} GPU{'s' * (count > 1)} between them"
    return ""


class Context:
    """`ClientContext` (see `mpifed.algorithms.base`): one client in one phase of one round."""

    def __init__(
        self,
        env: RunEnv,
        client: int,
        round_: int,
        phase: str,
        samples: Callable[[], tuple[Tensor, Tensor]],
        mean_examples: float,
        local: Any,
        test: Callable[[tuple[Tensor, Tensor], int], Mapping[str, float]] | None = None,
    ) -> None:
        self.env: Env = env
        self.id = client
        self.round = round_
        self.phase = phase
        self._samples = samples
        self._mean_examples = mean_examples
        self.model: Model = env.model(client)
        self.local = local
        self.logged: dict[str, float] = {}
        self._test = test

    # Taken when they are first asked for: not every phase looks at a client's samples.
    @cached_property
    def x(self) -> Tensor:
        return self._taken[0]

    @cached_property
    def y(self) -> Tensor:
        return self._taken[1]

    @cached_property
    def _taken(self) -> tuple[Tensor, Tensor]:
        return self._samples()

    @cached_property
    def examples(self) -> int:
        return len(self.y)

    @cached_property
    def relative_examples(self) -> float:
        return self.examples / self._mean_examples

    @cached_property
    def label_counts(self) -> Tensor:
        return torch.bincount(self.y.cpu(), minlength=self.env.spec.classes)

    def generator(self, purpose: str) -> torch.Generator:
        return torch_generator(self.env.seed, purpose, self.round, self.id)

    def log(self, name: str, value: float) -> None:
        if name in RESERVED or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"a number cannot be logged as '{name}': letters, digits, _ and -, and not {RESERVED}")
        self.logged[name] = float(value)

    def evaluate(self, parameters: Tensor, buffers: Tensor) -> Mapping[str, float]:
        if self._test is None:
            raise RuntimeError('a client can be tested only where the algorithm evaluates "clients" or "both"')
        return self._test((parameters, buffers), self.id)

    def owned(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it where it is part of the model's own memory, which the next client overwrites."""
        own = (self.model.parameters, self.model.buffers, self.model.gradient)
        memory = {part.untyped_storage().data_ptr() for part in own}
        return tensor.detach().clone() if tensor.untyped_storage().data_ptr() in memory else tensor.detach()
