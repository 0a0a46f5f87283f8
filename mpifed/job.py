"""The job: one TOML file, typed and validated before anything is computed; overrides; canonical form and hash.

`docs/job.md` is the reference of every key. The tables `[algorithm]`, `[model]`, `[data]` and `[data.partition]` hold a
`name` and the parameters of what it names, which are checked against that component's own signature.
"""

from __future__ import annotations

import copy
import datetime
import hashlib
import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mpifed.component import accepts, bind, explain, resolve, unknown_key
from mpifed.errors import BadInput

UNHASHED = (
    "out",
    "data.root",
    "data.download",
    "data.share",
    "device",
    "share_gpus",
    "turns",
    "round_timeout",
    "on_rank_death",
    "time_limit",
    "client_state_mb",
    "measure_wire",
    "collectives",
    "checkpoint",
)
"""Keys and tables that say where, and how safely, a run is computed: they are left out of `Job.sha256`."""

ROUTES = ("library", "flat", "tree", "hierarchical")
"""What `collectives` may name (`mpifed.comm.routes`)."""

BY_FIELD = ("codec", "collectives")
"""Keys that may hold a table by field; in `up.update` of such a table the dot belongs to the name."""

DEFAULT_JOB = """\
# The job that runs when none is named: ten clients, each with few of the ten digits, learn all of them together
# (8x8 pixels, no download), in half a minute. `algorithm.name=fedavg` is the same without a generator.
seed = 0
rounds = 20
clients = 10

[algorithm]
name = "fedgen"
generated_weight = 3.0
latent_kl_weight = 3.0

[model]
name = "mlp"

[data]
name = "digits"

[data.partition]
name = "dirichlet"
alpha = 0.1

[local]
epochs = 2
batch_size = 32
lr = 0.1
"""


# --- tables with keys of their own ------------------------------------------------------------------------------------
class _Table(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class LocalTraining(_Table):
    """`[local]`: how a client trains on its own data in one round."""

    epochs: int | None = Field(
        default=None, ge=1, description="Passes over the client's data in a round; 1 unless `steps` is given."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Optimiser steps in a round, instead of `epochs`: the same for every client."
    )
    batch_size: int = Field(
        default=32, ge=1, description="Examples in a batch; the last batch of an epoch may be smaller."
    )
    lr: float = Field(default=0.1, gt=0, description="Learning rate of round 1.")
    optimizer: Literal["sgd", "adam"] = Field(
        default="sgd", description="Made anew every round, without memory of the last."
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum of `sgd`.")
    nesterov: bool = Field(default=False, description="Nesterov's form of the momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="Factor of the L2 penalty, added to the gradient.")
    lr_schedule: Literal["constant", "exponential", "cosine", "step"] = Field(
        default="constant",
        description="How the learning rate falls from round to round; within a round it is constant.",
    )
    lr_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor of the learning rate: every round (`exponential`), every `lr_step` (`step`).",
    )
    lr_step: int = Field(default=1, ge=1, description='Rounds between two steps of `lr_schedule = "step"`.')
    head_decay: float = Field(
        default=0.0,
        ge=0,
        description="Factor of the sum of W^2 in the loss, W the kernel of the layer `head` (Keras' L2 regulariser).",
    )
    clip_norm: float = Field(default=0.0, ge=0, description="Largest L2 norm of a gradient; 0 does not clip.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Precision of the forward and backward pass; parameters stay float32."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("epochs") is None and table.get("steps") is None:
            return {**table, "epochs": 1}
        return table

    @model_validator(mode="after")
    def _agree(self) -> LocalTraining:
        if self.epochs is not None and self.steps is not None:
            raise BadInput(
                f"local.steps: {self.steps} steps and local.epochs = {self.epochs} exclude each other; drop one"
            )
        if self.optimizer != "sgd" and self.momentum:
            raise BadInput(
                f"local.momentum: belongs to the optimizer sgd, but local.optimizer is {self.optimizer}; set it to 0"
            )
        if self.nesterov and not self.momentum:
            raise BadInput("local.nesterov: needs local.momentum above 0")
        if self.lr_decay != 1 and self.lr_schedule not in ("exponential", "step"):
            raise BadInput(
                f'local.lr_decay: has no effect with local.lr_schedule = "{self.lr_schedule}"; use exponential or step'
            )
        if self.lr_step != 1 and self.lr_schedule != "step":
            raise BadInput(f'local.lr_step: has no effect with local.lr_schedule = "{self.lr_schedule}"; choose step')
        return self


class Transfer(_Table):
    """`[transfer]`: a client's training before its first round, on the public set and then on its own samples.

    The defaults are those of FedMD's published code; what they are monitored on is not (`mpifed.learning.transfer`).
    """

    lr: float = Field(default=0.001, gt=0, description="Learning rate of Adam.")
    public_epochs: int = Field(
        default=20, ge=0, description="At most so many passes over the public set, with its labels; 0 leaves it out."
    )
    public_batch_size: int = Field(default=128, ge=1, description="Public samples in a batch.")
    public_validation: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of the public set that is not trained on, but stops the training.",
    )
    public_patience: int = Field(default=3, ge=1, description="Epochs without progress that end the public training.")
    public_min_delta: float = Field(default=0.001, ge=0, description="What counts as progress in it.")
    private_epochs: int = Field(
        default=25, ge=0, description="At most so many passes over the client's own samples; 0 leaves them out."
    )
    private_batch_size: int = Field(default=32, ge=1, description="Own samples in a batch.")
    private_validation: float = Field(
        default=0.0, ge=0, lt=1, description="Fraction of the client's samples that is set aside to stop the training."
    )
    private_patience: int = Field(default=10, ge=1, description="Epochs without progress that end the own training.")
    private_min_delta: float = Field(default=0.001, ge=0, description="What counts as progress in it.")


class Evaluate(_Table):
    """`[evaluate]`: when and how the model is tested."""

    every_rounds: int = Field(default=1, ge=0, description="Rounds between two tests; 0 tests at the end only.")
    own: bool = Field(
        default=False,
        description="Test as well what every client, absent ones too, would use at the beginning of the round, on its"
        " own test samples (the partition's, or else those of its labels): `accuracy_own`, correct over samples.",
    )
    batch_size: int = Field(default=1000, ge=1, description="Examples in a batch of the test.")


class Checkpoint(_Table):
    """`[checkpoint]`: how much work a crash can cost."""

    every_rounds: int = Field(
        default=1, ge=0, description="Rounds between two checkpoints; 0 writes one on a signal and at the end only."
    )
    every_seconds: float = Field(
        default=0.0, ge=0, description="Seconds after which the next round's end writes one as well; 0 is off."
    )
    keep: int = Field(default=2, ge=2, description="Checkpoints kept; two, so that a damaged one has a predecessor.")


# --- tables that name a component -------------------------------------------------------------------------------------
class Component(_Table):
    """A `name` and, in `parameters`, everything its class or function takes, with defaults filled in."""

    model_config = ConfigDict(extra="allow")
    table: ClassVar[str]
    registry: ClassVar[tuple[str, str]]
    given: ClassVar[tuple[str, ...]] = ()
    """Parameters that the program fills in."""
    nested: ClassVar[tuple[str, ...]] = ()
    """Parameters that are components themselves."""

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The bound keyword arguments."""
        return dict(self.model_extra or {})

    @property
    def target(self) -> Callable[..., Any]:
        """The class or function that `name` stands for."""
        return self._resolve(self.name)

    def make(self, *given: Any) -> Any:
        """Call the component: with what the program gives, in order, and the job's parameters."""
        return self.target(*given, **self.parameters)

    @classmethod
    def _resolve(cls, name: str, key: str = "") -> Callable[..., Any]:
        module, attribute = cls.registry
        return resolve(getattr(importlib.import_module(module), attribute), name, key or f"{cls.table}.name")

    @model_validator(mode="before")
    @classmethod
    def _bind(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        kept = (*cls.model_fields, *cls.nested)
        own = {key: value for key, value in table.items() if key in kept}
        name = own.get("name", cls.model_fields["name"].default)
        if not isinstance(name, str):
            return own
        parameters = {key: value for key, value in table.items() if key not in own}
        bound = bind(cls._resolve(name), parameters, cls.table, (*cls.given, *cls.nested), tuple(cls.model_fields))
        return own | bound


class AlgorithmTable(Component):
    """`[algorithm]`: a frozen dataclass on `mpifed.algorithms.base.Algorithm`; its fields are the hyper-parameters.

    An algorithm that is built on another one has a field `base`: in the job a name, or a table such as this one.
    """

    table = "algorithm"
    registry = ("mpifed.algorithms", "ALGORITHMS")
    nested = ("base",)

    name: str = Field(default="fedavg", description="The federated algorithm.")

    @model_validator(mode="before")
    @classmethod
    def _bind_base(cls, table: Any) -> Any:
        """The base's own parameters bound as the algorithm's are; runs before `_bind`, which leaves `base` alone."""
        if not isinstance(table, dict) or not isinstance(table.get("name", "fedavg"), str):
            return table
        if not accepts(cls._resolve(table.get("name", "fedavg")), "base"):
            return table
        base = table.get("base", {"name": "fedavg"})
        base = {"name": base} if isinstance(base, str) else base
        if not isinstance(base, dict) or not isinstance(base.get("name", "fedavg"), str):
            raise BadInput(f"algorithm.base: must be the name of an algorithm or a table, but the job says {base!r}")
        name = base.get("name", "fedavg")
        target = cls._resolve(name, "algorithm.base")
        if accepts(target, "base"):
            raise BadInput(f"algorithm.base: '{name}' is built on a base itself; choose one that is not")
        parameters = {key: value for key, value in base.items() if key != "name"}
        return table | {"base": {"name": name} | bind(target, parameters, "algorithm.base", siblings=("name",))}

    def make(self, *given: Any) -> Any:
        """The algorithm, on its base where it has one."""
        parameters = self.parameters
        if "base" in parameters:
            base = dict(parameters["base"])
            parameters["base"] = self._resolve(base.pop("name"), "algorithm.base")(**base)
        return self.target(*given, **parameters)


class ModelTable(Component):
    """`[model]`: a function of the `DataSpec` that returns a module."""

    table = "model"
    registry = ("mpifed.models", "MODELS")
    given = ("spec",)

    name: str = Field(description="The model.")
    buffers: Literal["average", "local", "both"] = Field(
        default="average",
        description="Running statistics of batch norm: averaged like the weights, or kept by every client, or both: a"
        " client goes on with its own, and the server's model is tested with their mean.",
    )


class ClientModelTable(Component):
    """One of `[[client_models]]`: as `[model]`, without a say about running statistics, which stay with the client."""

    table = "client_models"
    registry = ("mpifed.models", "MODELS")
    given = ("spec",)

    name: str = Field(description="The model.")


class PartitionTable(Component):
    """`[data.partition]`: a function of the labels that deals the examples to the clients."""

    table = "data.partition"
    registry = ("mpifed.data", "PARTITIONS")
    given = ("labels", "clients", "rng", "test_labels", "owner")

    name: str = Field(default="iid", description="How the training examples are dealt to the clients.")


class PublicTable(Component):
    """`[data.public]`: a function that returns the public data set, which the server and every client have whole."""

    table = "data.public"
    registry = ("mpifed.data", "SOURCES")
    given = ("root",)

    name: str = Field(description="The public data set; its training samples are used.")

    def make(self, *given: Any) -> Any:
        """Read the data set; `given`: the root of the private one."""
        (root,) = given
        return self.target(**({"root": root} if accepts(self.target, "root") else {}), **self.parameters)


def _tuple(value: Any) -> Any:
    """What a table that is bound first has lost: that an array of JSON may become a tuple."""
    return tuple(value) if isinstance(value, list) else value


class DataTable(Component):
    """`[data]`: a function that returns the data set."""

    table = "data"
    registry = ("mpifed.data", "SOURCES")
    given = ("root",)

    name: str = Field(description="The data set.")
    root: str = Field(default="", description="Folder of the data sets; empty: `$MPIFED_DATA`, or else `data`.")
    share: Literal["auto", "off"] = Field(
        default="auto",
        description="`auto`: a data set is read once a node, and its ranks have one copy. `off`: one copy each.",
    )
    only_classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_tuple)] = Field(
        default=(), description="Only these classes, numbered anew from 0 in this order; none: all."
    )
    partition: PartitionTable = Field(
        default_factory=PartitionTable,
        description="How the examples are dealt to the clients.",
    )
    public: PublicTable | None = Field(
        default=None, description="A public data set beside the private one, for the algorithms that use one."
    )
    public_classes: Literal["union", "shared"] = Field(
        default="shared",
        description="`shared`: public and private labels mean the same classes. `union`: the private classes come after"
        " the public ones, and models put out all of them (FedMD).",
    )
    public_samples: int = Field(
        default=0, ge=0, description="So many of the public training samples, drawn from the seed; 0 takes all."
    )
    public_held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Instead of `[data.public]`: this part of the private training samples, drawn from the seed, is"
        " public, and the clients share the rest.",
    )

    @model_validator(mode="after")
    def _one_public_set(self) -> DataTable:
        if self.public_held_out and (self.public is not None or self.public_samples or self.public_classes == "union"):
            raise BadInput("data.public_held_out: is a public set of its own; leave out the other keys of a public set")
        return self

    def make(self, *given: Any) -> Any:
        """Read the data set."""
        root = {"root": self.root} if accepts(self.target, "root") else {}
        return self.target(*given, **root, **self.parameters)


# --- fields that need a word of their own -----------------------------------------------------------------------------
def _participation(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if whole or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError("must be a fraction above 0 and up to 1.0, or a whole number of clients from 1")


def _codec(value: Any) -> Any:
    return _by_field(
        value,
        "codec",
        'a codec such as "half", or a table such as {"up.update" = "half"}',
        r"(up|down)\.[A-Za-z0-9_-]+",
        "a field is named up.<field> or down.<field>, as in codec.up.update",
        _check_codec,
    )


def _collectives(value: Any) -> Any:
    return _by_field(
        value,
        "collectives",
        'a route such as "hierarchical", or a table such as {"up.update" = "hierarchical"}',
        r"(up|down)(\.[A-Za-z0-9_-]+)?",
        "is named up, down, up.<field> or down.<field>, as in codec.up.update",
        _check_route,
    )


def _by_field(
    value: Any, key: str, what: str, names: str, named: str, check: Callable[[Any, str], None]
) -> str | dict[str, Any]:
    """A value for all fields, or a table of them by field, flat; each checked. Raises ValueError or BadInput."""
    if isinstance(value, str):
        check(value, key)
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be {what}")
    flat = dict(flatten(value))
    for name, one in flat.items():
        if not re.fullmatch(names, name):
            raise BadInput(f"{key}.{name}: {named}")
        check(one, f"{key}.{name}")
    return flat


def _check_route(route: Any, key: str) -> None:
    if route not in ROUTES:
        raise BadInput(f"{key}: must be one of {', '.join(ROUTES)}, but the job says {json.dumps(route)}")


def _check_codec(text: Any, key: str) -> None:
    if not isinstance(text, str):
        raise BadInput(f'{key}: must be a codec such as "half", but the job says {json.dumps(text)}')
    importlib.import_module("mpifed.codecs").make(text, key)


def _scheduled(codec: str | dict[str, str]) -> bool:
    """Whether some codec depends on how much of the run is done."""
    texts = [codec] if isinstance(codec, str) else codec.values()
    make = importlib.import_module("mpifed.codecs").make
    return any(getattr(make(text, "codec"), "scheduled", False) for text in texts)


def route_among(collectives: str | Mapping[str, str], direction: str, field: str) -> str:
    """The route of a field among those of `Job.collectives`."""
    if isinstance(collectives, str):
        return collectives
    return collectives.get(f"{direction}.{field}", collectives.get(direction, "library"))


# --- the job ----------------------------------------------------------------------------------------------------------
class Job(_Table):
    """Everything that decides what a run computes, and where it leaves it."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="All randomness is a function of it.")
    rounds: int = Field(ge=1, description="Rounds of the run.")
    out: str = Field(default="", description="Run folder; empty: a new one under `runs/`.")
    clients: int = Field(ge=1, description="Clients of the federation, however many ranks there are.")
    participation: Annotated[int | float, BeforeValidator(_participation)] = Field(
        default=1.0,
        description="Clients in a round: a fraction above 0 and up to 1.0 (all), or a whole number (1 is ONE client).",
    )
    sampling: Literal["uniform", "examples", "bernoulli"] = Field(
        default="uniform",
        description="How a round's clients are drawn: without replacement, all alike (`uniform`) or by their number of"
        " examples (`examples`); or each on its own (`bernoulli`).",
    )
    reduce: Literal["ordered", "tree"] = Field(
        default="ordered",
        description="`ordered`: added in float64, the same bits on any number of ranks (long vectors on each rank"
        " first, exactly; others in the order of client ids); `tree`: summed on each rank, then one MPI reduce in"
        " float32.",
    )
    codec: Annotated[str | dict[str, str], BeforeValidator(_codec)] = Field(
        default="identity",
        description='Compression: one codec for every field, or a table such as `{"up.update" = "half"}`.',
    )
    min_replies: int = Field(default=1, ge=1, description="With fewer usable replies in a round the run stops.")
    threads: int = Field(default=1, ge=1, description="Threads of torch on each rank.")
    turns: Literal["auto", "off"] = Field(
        default="auto",
        description="`auto`: on a node with more ranks than cores, as many clients train at a time as cores allow.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="`cuda`: a GPU a rank; `auto`: where every rank has one, and the CPU elsewhere.",
    )
    share_gpus: bool = Field(default=False, description="Whether several ranks may use one GPU.")
    round_timeout: float = Field(
        default=3600.0, gt=0, description="Seconds after which a round counts as hung and the run ends."
    )
    on_rank_death: Literal["abort", "shrink"] = Field(
        default="abort",
        description="`abort`: the run ends, to be resumed; `shrink`: the others go on from the last checkpoint, with"
        " Open MPI 5 under `mpirun --with-ft ulfm` (docs/reliability.md).",
    )
    time_limit: float = Field(
        default=0.0,
        ge=0,
        description="Seconds after its start at which a run has left, with a checkpoint, for the next round might not"
        " end in time; 0: at the end of the Slurm job, if it is in one.",
    )
    client_state_mb: int = Field(
        default=1024, ge=0, description="Memory in MB for client states on each rank; what is beyond goes to disk."
    )
    measure_wire: Literal["auto", "off", "mpi_t", "tcp_info", "interface"] = Field(
        default="auto",
        description="Where the bytes on the wire are read: Open MPI's counters (`mpi_t`), those of the ranks' TCP"
        " connections, or of the nodes' network interfaces; `auto` takes the first that can be read (docs/mpi.md).",
    )
    collectives: Annotated[str | dict[str, str], BeforeValidator(_collectives)] = Field(
        default="library",
        description="How messages go between rank 0 and the others: `library` (by MPI's own collectives), `flat`,"
        ' `tree` or `hierarchical` (by node); one for all, or a table such as `{down = "tree", "up.update" ='
        ' "hierarchical"}` (docs/mpi.md).',
    )
    algorithm: AlgorithmTable = Field(
        default_factory=AlgorithmTable, description="The algorithm and its hyper-parameters."
    )
    model: ModelTable = Field(description="The model and its parameters.")
    client_models: tuple[ClientModelTable, ...] = Field(
        default=(),
        description="Models of the clients' own, dealt in turn: client k has number k modulo their count; none: all"
        " have `[model]`.",
    )
    data: DataTable = Field(description="The data set and its parameters.")
    local: LocalTraining = Field(default_factory=LocalTraining, description="Training on a client.")
    transfer: Transfer | None = Field(default=None, description="Training before a client's first round.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="Testing.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Checkpoints.")

    @model_validator(mode="after")
    def _agree(self) -> Job:
        if isinstance(self.participation, int) and self.participation > self.clients:
            raise BadInput(f"participation: {self.participation} clients in a round, but clients is {self.clients}")
        algorithm = self._algorithm()
        public = self.data.public is not None or self.data.public_held_out > 0
        if self.client_models and getattr(algorithm, "evaluates", "clients") == "server":
            raise BadInput(
                f"client_models: {self.algorithm.name} makes one model of its clients', which all have [model]; leave "
                "client_models out (on the command line client_models=[])"
            )
        if getattr(algorithm, "needs_public", False) and not public:
            raise BadInput(
                f"data.public: {self.algorithm.name} needs a public data set; name one in [data.public], or hold out a "
                "part of the private one with data.public_held_out"
            )
        if getattr(algorithm, "needs_client_models", False) and not self.client_models:
            raise BadInput(
                f"client_models: {self.algorithm.name} gives every client a model of its own beside the shared one of "
                "[model]; name at least one in [[client_models]]"
            )
        if self.transfer is not None and self.transfer.public_epochs and not public:
            raise BadInput(
                "transfer.public_epochs: there is no public data set; name one in [data.public], or set it to 0"
            )
        if self.transfer is not None and not getattr(algorithm, "begins_with_transfer", True):
            raise BadInput(
                f"transfer: {self.algorithm.name} does not begin with what a transfer leaves (fedmd, local and pooled "
                "do); leave [transfer] out"
            )
        most = self.architectures if algorithm.pooled else self.most_participants
        if self.min_replies > most:
            raise BadInput(f"min_replies: {self.min_replies} replies can never come from {most} client(s) in a round")
        return self

    def _algorithm(self) -> Any:
        try:
            algorithm = self.algorithm.make()
            if not hasattr(algorithm, "check"):
                raise BadInput(f"algorithm.name: '{self.algorithm.name}' is not an mpifed.algorithms.base.Algorithm")
            algorithm.check(self.local)
        except ValueError as error:
            names_a_key = re.match(r"[\w.]+: ", str(error))
            prefix = "" if str(error).startswith("local.") else "algorithm." if names_a_key else "algorithm: "
            raise BadInput(f"{prefix}{error}") from error
        return algorithm

    def tests_after(self, round_: int) -> bool:
        """Whether the model of that round (from 1) is tested."""
        return self._is_due(self.evaluate.every_rounds, round_)

    def saves_after(self, round_: int) -> bool:
        """Whether that round's end is a checkpoint's time, by rounds."""
        return self._is_due(self.checkpoint.every_rounds, round_)

    def _is_due(self, every: int, round_: int) -> bool:
        return round_ == self.rounds or bool(every and round_ % every == 0)

    @property
    def architectures(self) -> int:
        """How many models the clients have between them, of `client_models` where there are such."""
        return min(self.clients, max(1, len(self.client_models)))

    @property
    def most_participants(self) -> int:
        """The largest number of clients in a round: of a fraction, rounded half up but at least 1; where every client
        is drawn by itself (`bernoulli`), all."""
        if self.sampling == "bernoulli":
            return self.clients
        if isinstance(self.participation, int):
            return self.participation
        return max(1, int(self.participation * self.clients + 0.5))

    def codec_of(self, direction: Literal["up", "down"], field: str) -> str:
        """The codec of one exchanged field, as text for `mpifed.codecs.parse`."""
        return self.codec if isinstance(self.codec, str) else self.codec.get(f"{direction}.{field}", "identity")

    def route_of(self, direction: Literal["up", "down"], field: str) -> str:
        """The route of one exchanged field: its own, its direction's, or `library`."""
        return route_among(self.collectives, direction, field)

    # --- forms --------------------------------------------------------------------------------------------------------
    def canonical(self) -> str:
        """JSON with sorted keys and every default spelled out: equal jobs have equal texts."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_canonical(cls, text: str) -> Job:
        """The job of `canonical()`, validated again. Raises `BadInput`."""
        return _validate(text)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the canonical form without what cannot change results (`UNHASHED`): for a run."""
        return _digest(self._hashed())

    @property
    def resume_sha256(self) -> str:
        """The same without `rounds` where `check_resume` lets it change: for a checkpoint, which has no last round."""
        return _digest({key: value for key, value in self._hashed().items() if key not in self._free_to_change()})

    def _hashed(self) -> dict[str, Any]:
        return {key: value for key, value in flatten(json.loads(self.canonical())) if not unhashed(key)}

    def _free_to_change(self) -> set[str]:
        return set() if self.local.lr_schedule == "cosine" or _scheduled(self.codec) else {"rounds"}

    def to_toml(self) -> str:
        """The job as TOML with every default spelled out; `load` of it gives an equal job."""
        return "\n".join(_toml_table(json.loads(self.model_dump_json()), "")) + "\n"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def unhashed(key: str) -> bool:
    """Whether a dotted key says where, and not what, a run computes."""
    return any(key == name or key.startswith(name + ".") for name in UNHASHED)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested tables; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- reading ----------------------------------------------------------------------------------------------------------
def load(text: str | None, overrides: Sequence[str] = (), source: str = "the job") -> Job:
    """The job in a TOML `text` (None: `DEFAULT_JOB`) with `overrides` such as `local.lr=0.05`.

    The value of an override is read as TOML, or else taken as a bare string; `merge` says what an override does. Where
    clients have models of their own, the first of them is `[model]` if that is left out.
    `source` is the file's name for the message of a syntax error. Raises `BadInput`, one line for each fault, naming
    the dotted keys.
    """
    return from_document(merge(parse(text, source), _given(overrides)))


def parse(text: str | None, source: str = "the job") -> dict[str, Any]:
    """The tables in a TOML `text` (None: `DEFAULT_JOB`), not validated. Raises `BadInput` for a syntax error."""
    text = DEFAULT_JOB if text is None else text
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        where = str(error).replace("at end of document", f"at line {len(text.splitlines())}, the end")
        raise BadInput(f"{source} is not valid TOML: {where}") from error


def from_document(document: Mapping[str, Any]) -> Job:
    """The job in the tables of a parsed file. Raises `BadInput`, one line for each fault, naming the dotted keys."""
    if "model" not in document and isinstance(own := document.get("client_models"), list) and own:
        document = {**document, "model": own[0]}
    for key, value in flatten(document):
        if isinstance(value, datetime.datetime | datetime.date | datetime.time):
            raise BadInput(f"{key}: no key holds a date or a time, but the job says {value}")
    return _validate(json.dumps(document, default=str))


def _validate(text: str) -> Job:
    try:
        return Job.model_validate_json(text)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "extra_forbidden":
                raise _unknown(".".join(map(str, item["loc"]))) from error
        raise BadInput(explain(error, lambda place: ".".join(map(str, place)) or "job")) from error


def keys(model: type[BaseModel] = Job, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the job that is not a parameter of a component, tables too."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if (table := table_of(field.annotation)) is not None:
            yield from keys(table, f"{prefix}{name}.")


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a field that holds a table, or a table or None; None for any other field."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _unknown(key: str) -> BadInput:
    table, _, name = key.rpartition(".")
    everything = list(keys())
    siblings = [known.rpartition(".")[2] for known in everything if known.rpartition(".")[0] == table]
    error = unknown_key(key, siblings, f"[{table}]" if table else "the job")
    elsewhere = [known for known in everything if known.rpartition(".")[2] == name]
    return BadInput(f"`{key}` is not a key of the job; did you mean `{elsewhere[0]}`?") if elsewhere else error


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """Values by dotted key from `key=value` texts."""
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise BadInput(f"'{text}' is not an override; write key=value, for example rounds=50")
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", key):
            raise BadInput(
                f"'{text}' is not an override; its key '{key}' must be dotted names, for example local.lr=0.05"
            )
        if key in values:
            raise BadInput(f"{key}: is given twice among the overrides")
        values[key] = _value(value.strip())
    return values


def merge(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tables of a job with `overrides`, values by dotted key; nothing is validated.

    One that changes the `name` in a table drops the parameters of the old name (names go first, outer ones before
    inner ones, so that what is given with a name stays); one that sets `local.steps` drops `local.epochs`, and the
    reverse. Raises `BadInput` where a table is overridden both as a whole and in part.
    """
    merged = copy.deepcopy(dict(document))
    values = {_path(key): value for key, value in overrides.items()}
    for path in values:
        for whole in (path[:length] for length in range(1, len(path))):
            if whole in values:
                raise BadInput(
                    f"{'.'.join(path)}: {'.'.join(whole)} is overridden as a whole as well; drop one of them"
                )
    for name in BY_FIELD:
        if isinstance(merged.get(name), dict):
            merged[name] = dict(flatten(merged[name]))
    for path in sorted(values, key=lambda path: (path[-1] != "name", len(path))):
        _set(merged, path, values[path])
    for chosen, other in (("steps", "epochs"), ("epochs", "steps")):
        if ("local", chosen) in values and ("local", other) not in values:
            merged["local"].pop(other, None)
    return merged


def _path(key: str) -> tuple[str, ...]:
    path = tuple(key.split("."))
    return (path[0], ".".join(path[1:])) if path[0] in BY_FIELD and len(path) > 1 else path


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _set(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    table = document
    for depth, part in enumerate(path[:-1], start=1):
        if path[:depth] == ("algorithm", "base") and isinstance(table.get(part), str):
            table[part] = {"name": table[part]}
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]
    if path == ("algorithm", "base", "name") and value != table.get("name", "fedavg"):
        table.clear()
    components = {
        component.table: component for component in (AlgorithmTable, ModelTable, DataTable, PartitionTable, PublicTable)
    }
    component = components.get(".".join(path[:-1]))
    if component and path[-1] == "name" and value != table.get("name", component.model_fields["name"].default):
        for parameter in [key for key in table if key not in component.model_fields]:
            del table[parameter]
    table[path[-1]] = value


# --- resuming ---------------------------------------------------------------------------------------------------------
def changed_keys(old: Job, new: Job) -> dict[str, tuple[Any, Any]]:
    """Old and new value of every key that can change results and did; empty where the `sha256` are equal.

    Names of components come first: they tell more than the parameters that change with them.
    """
    before, after = old._hashed(), new._hashed()
    keys = sorted(before | after, key=lambda key: (not key.endswith(".name"), key))
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def check_resume(old: Job, new: Job, done: int = 0) -> None:
    """Refuse to go on with a run of `old`, of which `done` rounds are computed, as `new`, where results would not fit.

    What is not hashed (`UNHASHED`) may change, and `rounds`, down to `done`; not with a learning rate or a codec that
    depends on it (`cosine`, a schedule of `svd`). Raises `BadInput` naming the changed keys.
    """
    changed = {key: values for key, values in changed_keys(old, new).items() if key not in new._free_to_change()}
    if changed:
        listed = ", ".join(f"{key} ({json.dumps(was)} -> {json.dumps(is_)})" for key, (was, is_) in changed.items())
        raise BadInput(f"the run cannot be resumed with another {listed}; start a new run folder with out=...")
    if new.rounds < done:
        raise BadInput(f"rounds: {done} rounds are done already, but the job says {new.rounds}")


# --- writing ----------------------------------------------------------------------------------------------------------
def _toml_table(table: Mapping[str, Any], path: str) -> Iterator[str]:
    """Lines of a table: values first, then its sub-tables; what is None has no key, as TOML has no null."""
    for key, value in table.items():
        if value is not None and not isinstance(value, dict):
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            name = f"{path}{_toml_key(key)}"
            yield from ("", f"[{name}]")
            yield from _toml_table(value, name + ".")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, dict):
        items = [f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None]
        return f"{{{', '.join(items)}}}"
    # JSON's strings, numbers and booleans are TOML's, but for the one control character that JSON leaves bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
