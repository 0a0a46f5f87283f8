"""What a federated algorithm is: a few pure functions of explicit state, and a declaration of what crosses the network.

A round is one or more phases. In a phase the server builds a download, every client of the phase answers it, the
replies are brought together as each uploaded field asks (`Mean`, `Sum` or `Each`), and the server makes its next state
of them. The engine alone knows about ranks, messages, compression, absent clients and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mpifed.types import DataSpec, Layout, Payload, State


# --- how an uploaded field reaches the server -------------------------------------------------------------------------
@dataclass(frozen=True)
class Sum:
    """Added over the replies: the server receives one tensor, however many clients answered."""


@dataclass(frozen=True)
class Mean:
    """Averaged over the replies, with the weights that the clients give (`Reply.weight`) or, `uniform`, equal ones."""

    weights: Literal["reply", "uniform"] = "reply"


@dataclass(frozen=True)
class Each:
    """One tensor per reply, in the order of client ids; `weights` are those of its mean, should one be asked for."""

    weights: Literal["reply", "uniform"] = "uniform"


@dataclass(frozen=True)
class Field:
    """One named tensor of a download or an upload.

    `shape` may hold one `None` for a length that only the sender knows (then the field is `Each`, or a download).
    `layout` names the tensors inside a flat vector, for codecs that compress matrix by matrix. A download with
    `to="each"` has one more axis in front, `[clients of the phase, *shape]` or, where the server does not know who that
    will be, `[clients of the federation, *shape]`, and every client gets its own row; with `to="everybody"` absent
    clients are sent it as well, and it is counted for each of them.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype = torch.float32
    reduce: Sum | Mean | Each = Each()
    layout: Layout | None = None
    to: Literal["participants", "each", "everybody"] = "participants"

    def __post_init__(self) -> None:
        if self.shape.count(None) > 1:
            raise ValueError(f"a field may have one unknown length, not {self.shape}")


def takes_weights(fields: Mapping[str, Field]) -> bool:
    """Whether the mean of one of these uploaded fields takes the replies' weights, which then count as uploaded too."""
    return any(getattr(declared.reduce, "weights", "uniform") == "reply" for declared in fields.values())


# --- what a client answers --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reply:
    """A client's answer: its upload and the weight of its upload in every `Mean` (its number of samples, as a rule)."""

    upload: Payload
    weight: float = 1.0


@dataclass(frozen=True)
class Absent:
    """Instead of a reply: the client took part, and keeps its new state, but its upload does not arrive."""

    reason: str


class Uploads(Protocol):
    """The replies of one phase as the server sees them; tensors on the server's device."""

    @property
    def clients(self) -> Sequence[int]:
        """Ids of the clients whose replies count, ascending."""

    @property
    def weights(self) -> Tensor:
        """Their weights, float64 `[clients]`."""

    def mean(self, field: str) -> Tensor:
        """The mean of a `Mean` field; of an `Each` field too, computed alike bit for bit."""

    def sum(self, field: str) -> Tensor:
        """The sum of a `Sum` field, or of an `Each` field."""

    def each(self, field: str) -> Sequence[Tensor]:
        """An `Each` field, one tensor a client in the order of `clients`."""


# --- what an algorithm is given ---------------------------------------------------------------------------------------
class Model(Protocol):
    """A module whose parameters are views of one flat vector (`mpifed.models.flat`)."""

    module: nn.Module
    layout: Layout
    buffer_layout: Layout
    parameters: Tensor  # [d] float32
    gradient: Tensor  # [d] float32
    buffers: Tensor  # [b] float32, the floating-point running statistics

    def load(self, parameters: Tensor, buffers: Tensor | None = None) -> None: ...

    def zero_gradient(self) -> None: ...

    def drop_gradient(self) -> None: ...

    def gradients(self) -> list[Tensor]: ...

    def gather_gradient(self) -> None: ...

    @property
    def training(self) -> bool: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class PublicSet(Protocol):
    """The public data set of the job (`[data.public]`): the server and every client have it whole."""

    labels: Tensor  # int64 [samples], on the CPU
    classes: int  # its own; with `public_classes = "union"` the clients' private labels begin after them

    def __len__(self) -> int: ...

    def x(self, indices: Tensor) -> Tensor:
        """Those samples as model input `[k, *input_shape]` on the device: float32, standardised, or int64 token ids.

        `indices` int64 `[k]`.
        """


class Auxiliary(NamedTuple):
    """A model that is no classifier (a generator, say): one instance on a rank, and its initial values."""

    model: Model  # to be loaded first
    parameters: Tensor  # [d]
    buffers: Tensor  # [b]


class Env(Protocol):
    """What is known when a run is set up, on the server and on every client alike."""

    seed: int
    rounds: int
    clients: int
    spec: DataSpec
    device: torch.device
    shared_buffers: bool  # running statistics reach the server and are averaged (`model.buffers` is not "local")
    own_buffers: bool  # a client goes on with its own running statistics, whatever it is sent (not "average")
    local: Any  # the job's [local] (mpifed.job.LocalTraining)
    transfer: Any  # the job's [transfer] (mpifed.job.Transfer), or None

    @property
    def public(self) -> PublicSet | None:
        """The public data set, where the job names one."""

    def model(self, client: int | None = None) -> Model:
        """The model that is shared (`[model]`), or the client's own (`[[client_models]]`, where the job has them).

        One instance per architecture and rank, shared and own never the same one where the job tells them apart; it
        has to be loaded.
        """

    def initial(self, client: int | None = None) -> tuple[Tensor, Tensor]:
        """That model's initial parameters `[d]` and buffers `[b]`, a function of the seed."""

    def auxiliary(self, name: str, factory: Callable[[], nn.Module]) -> Auxiliary:
        """The model called `name`, made by `factory()` when it is first asked for; its start depends on the seed."""

    def generator(self, purpose: str, *key: int) -> torch.Generator:
        """A generator that depends on the seed, the purpose and the key alone."""

    def once(self, purpose: str, client: int, make: Callable[[], State]) -> State:
        """`make()`, computed once on a rank for all clients that share an architecture.

        For what depends on the job and on the client's architecture alone: that a rank keeps it changes no bit.
        """


class ClientContext(Protocol):
    """One client in one round. It knows no rank, no communicator and no path."""

    id: int
    round: int  # from 1
    phase: str
    env: Env
    model: Model  # the client's own where models differ, else the shared one; to be loaded first
    local: Any  # the job's [local] (mpifed.job.LocalTraining)

    @property
    def x(self) -> Tensor:
        """The client's samples `[examples, *input_shape]` on the device: float32, standardised, or int64 token ids."""

    @property
    def y(self) -> Tensor:
        """Their labels, int64 `[examples]`."""

    @property
    def examples(self) -> int:
        """How many there are."""

    @property
    def relative_examples(self) -> float:
        """That over the mean of all clients'."""

    @property
    def label_counts(self) -> Tensor:
        """How many there are of each class, int64 `[classes]`, on the CPU."""

    def generator(self, purpose: str) -> torch.Generator:
        """A generator for (seed, purpose, round, client)."""

    def log(self, name: str, value: float) -> None:
        """A number for the round's record; the mean over the clients is reported under `name`."""

    def evaluate(self, parameters: Tensor, buffers: Tensor) -> Mapping[str, float]:
        """`accuracy` and `loss` of `model` with these values on the whole test set: for the record, not to learn from.

        Only where `evaluates` is not `"server"`, since ranks that test nothing hold no test set.
        """


# --- the algorithm ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Phase:
    """One exchange of a round: a download, what each client does with it, and what the server makes of the replies.

    `repeat` runs it that often in a row (a server loop spread over the ranks). `clients="all"` asks every client of
    the federation, not only those of the round. `down` and `up` may differ from round to round: functions of it. A
    phase takes place in the rounds (from 1) for which `rounds` is true; every round needs one.
    """

    name: str
    down: Callable[[int], Mapping[str, Field]]
    up: Callable[[int], Mapping[str, Field]]
    download: Callable[[State, int], Payload]
    client: Callable[[State, Payload, ClientContext], tuple[State, Reply | Absent]]
    server: Callable[[State, Uploads, int], State]
    clients: Literal["round", "all"] = "round"
    repeat: int = 1
    rounds: Callable[[int], bool] = lambda round_: True


@dataclass(frozen=True)
class Ensemble:
    """Several models of the shared architecture that predict together: the (weighted) mean of their logits."""

    members: tuple[tuple[Tensor, Tensor], ...]  # parameters [d] and buffers [b] of each
    weights: tuple[float, ...] = ()  # relative; none: equal


@dataclass(frozen=True)
class Algorithm:
    """Base of every algorithm: a frozen dataclass whose fields are its hyper-parameters.

    The simplest algorithm overrides `server_init`, `down`, `up`, `download`, `client` and `server`; one of several
    phases overrides `phases` instead. Inputs are never changed in place: a download is shared by the clients of a rank.
    """

    evaluates: ClassVar[Literal["server", "clients", "both"]] = "server"
    """Whose model is tested: the server's, or every client's own (the mean over the clients is then the accuracy);
    with `"both"` the server's too, reported as `server_accuracy`."""
    stateful: ClassVar[bool] = False
    """Clients keep a state between rounds; they are then trained where that state lives."""
    pooled: ClassVar[bool] = False
    """All data in one place: one client, or one of each of the job's `client_models`, holds what the partition gives to
    all (an upper bound)."""
    needs_public: ClassVar[bool] = False
    """The job has to name a public data set (`[data.public]`)."""
    needs_client_models: ClassVar[bool] = False
    """The job has to name models of the clients' own (`[[client_models]]`), beside the one that is shared."""
    begins_with_transfer: ClassVar[bool] = False
    """A client's first model is what the job's `[transfer]` leaves; no other algorithm takes one."""

    def check(self, local: Any) -> None:
        """Raise `ValueError("key: why")` where these hyper-parameters do not go with the job's local training."""

    def check_models(self, env: Env, client: int) -> None:
        """Raise `BadInput` where a client's model does not go with the shared one; asked before round 1."""

    def server_init(self, env: Env) -> State:
        """The server's state before round 1."""
        return {}

    def client_init(self, env: Env, client: int) -> State:
        """A client's state before it first takes part."""
        return {}

    def down(self, env: Env) -> Mapping[str, Field]:
        """The fields of the download."""
        return {}

    def up(self, env: Env) -> Mapping[str, Field]:
        """The fields of the upload, with how each reaches the server."""
        return {}

    def download(self, server: State, round_: int) -> Payload:
        """What the server sends."""
        return {}

    def client(self, state: State, down: Payload, ctx: ClientContext) -> tuple[State, Reply | Absent]:
        """What one client does with it: its next state and its reply."""
        raise NotImplementedError

    def server(self, server: State, uploads: Uploads, round_: int) -> State:
        """What the server makes of the replies: its next state."""
        return server

    def sent(self, server: State, down: Payload, round_: int) -> State:
        """After sending: `down` as the clients decoded it, so that a lossy codec keeps everybody in step."""
        return server

    def acknowledged(self, before: State, after: State, down: Payload, sent: Payload) -> State:
        """The client state to keep where a codec changed the upload: `sent` is the upload as the server will decode it.

        Called on the client's rank once its reply is encoded, and only in a phase with a codec that is not plain;
        `before` is the state that the client was given, `after` the one that it returned. An algorithm in which clients
        remember what they uploaded (a control variate, a memory) remembers here what was received instead.
        """
        return after

    def phases(self, env: Env) -> tuple[Phase, ...]:
        """The phases of a round, the same on every rank."""
        down, up = self.down(env), self.up(env)
        return (Phase("train", lambda t: down, lambda t: up, self.download, self.client, self.server),)

    def predictor(self, server: State, env: Env) -> tuple[Tensor, Tensor] | Ensemble:
        """Parameters `[d]` and buffers `[b]` of the model that is evaluated and exported, or several models' of it."""
        raise NotImplementedError

    def received(self, state: State, down: Payload, env: Env, client: int) -> tuple[Tensor, Tensor]:
        """What a client would use now, having been sent `down` (of the round's first phase) and before it trains.

        For `evaluate.own`, which tests it on every client's own test samples, of absent clients too. The model that was
        sent, with the client's own running statistics where it keeps some.
        """
        if "model" not in down:
            return self.client_predictor(state, env, client)
        own: Tensor = state.get("buffers", env.initial(client)[1])
        return down["model"], own if env.own_buffers else down.get("buffers", own)

    def client_predictor(self, state: State, env: Env, client: int) -> tuple[Tensor, Tensor]:
        """The same for a client's own model, where `evaluates` is `"clients"`."""
        raise NotImplementedError


def field_names(phases: tuple[Phase, ...]) -> tuple[tuple[str, str], ...]:
    """Every (direction, kind) that is exchanged, `("down", "model")` and so on, in order.

    Those of rounds 1 and 2: the first may differ from all others.
    """
    fields = {
        (direction, name): None
        for round_ in (1, 2)
        for phase in phases
        if phase.rounds(round_)
        for direction, of_round in (("down", phase.down), ("up", phase.up))
        for name in of_round(round_)
    }
    return tuple(fields)
