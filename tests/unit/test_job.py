"""The job: what is refused and how it is said, what counts as the same job, and that it survives being written."""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import Field

from mpifed.comm.routes import Route
from mpifed.component import parameters, resolve
from mpifed.errors import BadInput
from mpifed.federation import roster
from mpifed.job import (
    DEFAULT_JOB,
    ROUTES,
    UNHASHED,
    AlgorithmTable,
    DataTable,
    Job,
    LocalTraining,
    ModelTable,
    PartitionTable,
    check_resume,
    keys,
    load,
    table_of,
)
from mpifed.sweep.plan import is_sweep

ROOT = Path(__file__).parents[2]


# --- small components, so that nothing here depends on the real ones --------------------------------------------------
@dataclass(frozen=True)
class FedAvg:
    pooled = False

    def check(self, local: LocalTraining) -> None: ...


@dataclass(frozen=True)
class FedProx(FedAvg):
    mu: Annotated[float, Field(ge=0)] = 0.01


@dataclass(frozen=True)
class Scaffold(FedAvg):
    option: Literal["I", "II"] = "II"

    def check(self, local: LocalTraining) -> None:
        if self.option == "II" and local.optimizer != "sgd":
            raise ValueError("option: 'II' needs local.optimizer = \"sgd\"; choose 'I'")
        if local.clip_norm:
            raise ValueError("local.clip_norm: must be 0 with scaffold")
        if local.precision != "float32":
            raise ValueError("needs full precision")


@dataclass(frozen=True)
class Pooled(FedAvg):
    pooled = True


def mlp(spec: Any, *, hidden: tuple[int, ...] = (64,), dropout: float = 0.0) -> Any:
    return ("mlp", spec, hidden)


def resnet18(spec: Any, *, norm: Literal["batch", "group"] = "batch", stem: Literal["imagenet", "cifar"]) -> Any: ...


def mnist(*, root: str = "", download: bool = False, validation: float = 0.0) -> Any:
    return ("mnist", root)


def digits() -> Any:
    return "digits"


def iid(labels: Any, clients: int, rng: Any, test_labels: Any = None) -> Any: ...


def dirichlet(
    labels: Any, clients: int, rng: Any, test_labels: Any = None, *, alpha: Annotated[float, Field(gt=0)]
) -> Any:
    return (labels, clients, alpha)


@dataclass(frozen=True)
class Svd:
    energy: Annotated[float, Field(gt=0, le=1)] = 0.95


@dataclass(frozen=True)
class Identity: ...


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_components")
    for component in (FedAvg, FedProx, Scaffold, Pooled, mlp, resnet18, mnist, digits, iid, dirichlet, Svd, Identity):
        setattr(module, component.__name__, component)
    module.number = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_components", module)

    def registry(*components: Callable[..., Any]) -> dict[str, str]:
        return {item.__name__.lower(): f"fake_components:{item.__name__}" for item in components}

    monkeypatch.setattr("mpifed.algorithms.ALGORITHMS", registry(FedAvg, FedProx, Scaffold, Pooled))
    monkeypatch.setattr("mpifed.models.MODELS", registry(mlp, resnet18))
    monkeypatch.setattr("mpifed.data.SOURCES", registry(mnist, digits))
    monkeypatch.setattr("mpifed.data.PARTITIONS", registry(iid, dirichlet))
    monkeypatch.setattr("mpifed.codecs.CODECS", registry(Identity, Svd))


uses_fakes = pytest.mark.usefixtures("fakes")

JOB = """\
seed = 7
rounds = 20
out = "runs/one"
clients = 10
participation = 0.5
codec = {"up.update" = "svd(energy=0.9)"}

[algorithm]
name = "fedprox"
mu = 0.1

[model]
name = "mlp"
hidden = [32, 16]

[data]
name = "mnist"
root = "somewhere"

[data.partition]
name = "dirichlet"
alpha = 0.5

[local]
epochs = 2
lr = 0.05
"""

# (the key that must be named, overrides on JOB); what no override can say is tested below
MALFORMED: list[tuple[str, list[str]]] = [
    # unknown keys, in every table
    ("round", ["round=3"]),
    ("lr", ["lr=0.1"]),
    ("algorithm.muu", ["algorithm.muu=1"]),
    ("model.hiden", ["model.hiden=[3]"]),
    ("model.buffer", ["model.buffer=local"]),
    ("data.rot", ["data.rot=here"]),
    ("data.alpha", ["data.alpha=0.5"]),
    ("data.partition.alhpa", ["data.partition.alhpa=1"]),
    ("local.epoch", ["local.epoch=1"]),
    ("local.learning_rate", ["local.learning_rate=0.1"]),
    ("evaluate.every", ["evaluate.every=1"]),
    ("checkpoint.every", ["checkpoint.every=1"]),
    ("optimiser", ["optimiser.name=sgd"]),
    # wrong types
    ("seed", ["seed=1.5"]),
    ("seed", ["seed=true"]),
    ("rounds", ["rounds=twenty"]),
    ("rounds", ["rounds='20'"]),
    ("rounds", ["rounds=[20]"]),
    ("rounds", ["rounds=20.0"]),
    ("clients", ["clients=1979-05-27"]),
    ("out", ["out=3"]),
    ("participation", ["participation=all"]),
    ("participation", ["participation=true"]),
    ("min_replies", ["min_replies=[1]"]),
    ("local", ["local=3"]),
    ("local.lr", ["local.lr.initial=0.1"]),
    ("local.lr", ["local.lr='0.1'"]),
    ("local.nesterov", ["local.nesterov=1"]),
    ("local.epochs", ["local.epochs=0.5"]),
    ("algorithm", ["algorithm=fedavg"]),
    ("algorithm.name", ["algorithm.name=3"]),
    ("algorithm.mu", ["algorithm.mu=large"]),
    ("model", ["model=[1, 2]"]),
    ("model.hidden", ["model.hidden=64"]),
    ("model.hidden", ["model.hidden=[64, 'x']"]),
    ("data.root", ["data.root=0"]),
    ("data.partition", ["data.partition=iid"]),
    ("data.partition.alpha", ["data.partition.alpha={a=1}"]),
    ("checkpoint", ["checkpoint=[]"]),
    ("codec", ["codec=3"]),
    ("codec.up.update", ["codec.up.update=3"]),
    # out of range
    ("seed", ["seed=-1"]),
    ("rounds", ["rounds=0"]),
    ("clients", ["clients=0"]),
    ("participation", ["participation=0"]),
    ("participation", ["participation=0.0"]),
    ("participation", ["participation=1.5"]),
    ("participation", ["participation=-0.1"]),
    ("min_replies", ["min_replies=0"]),
    ("threads", ["threads=0"]),
    ("round_timeout", ["round_timeout=0"]),
    ("client_state_mb", ["client_state_mb=-1"]),
    ("measure_wire", ["measure_wire=nic"]),
    ("local.epochs", ["local.epochs=0"]),
    ("local.steps", ["local.steps=0"]),
    ("local.batch_size", ["local.batch_size=-32"]),
    ("local.lr", ["local.lr=0.0"]),
    ("local.momentum", ["local.momentum=1.0"]),
    ("local.weight_decay", ["local.weight_decay=-1e-4"]),
    ("local.lr_decay", ["local.lr_schedule=step", "local.lr_decay=1.1"]),
    ("local.clip_norm", ["local.clip_norm=-1"]),
    ("evaluate.every_rounds", ["evaluate.every_rounds=-1"]),
    ("evaluate.batch_size", ["evaluate.batch_size=0"]),
    ("checkpoint.every_seconds", ["checkpoint.every_seconds=-1"]),
    ("checkpoint.keep", ["checkpoint.keep=1"]),
    ("algorithm.mu", ["algorithm.mu=-0.1"]),
    ("data.partition.alpha", ["data.partition.alpha=0"]),
    # not finite
    ("participation", ["participation=nan"]),
    ("round_timeout", ["round_timeout=inf"]),
    ("local.lr", ["local.lr=nan"]),
    ("local.lr", ["local.lr=-inf"]),
    ("algorithm.mu", ["algorithm.mu=nan"]),
    ("data.partition.alpha", ["data.partition.alpha=inf"]),
    # unknown or empty names
    ("sampling", ["sampling=unifrom"]),
    ("sampling", ["sampling="]),
    ("reduce", ["reduce=ring"]),
    ("device", ["device=gpu"]),
    ("local.optimizer", ["local.optimizer=adamw"]),
    ("local.lr_schedule", ["local.lr_schedule=linear"]),
    ("local.precision", ["local.precision=float16"]),
    ("model.buffers", ["model.buffers=global"]),
    ("algorithm.name", ["algorithm.name=fedporx"]),
    ("algorithm.name", ["algorithm.name="]),
    ("algorithm.name", ["algorithm.name=no.such.module:Mine"]),
    ("algorithm.name", ["algorithm.name=fake_components:Nobody"]),
    ("algorithm.name", ["algorithm.name=fake_components:number"]),
    ("model.name", ["model.name=resnet19"]),
    ("model.stem", ["model.name=resnet18"]),
    ("data.name", ["data.name=minst"]),
    ("data.partition.name", ["data.partition.name=dirichelt"]),
    ("data.partition.alpha", ["data.partition.name=iid", "data.partition.alpha=1"]),
    ("codec", ["codec=svdd"]),
    ("codec", ["codec="]),
    ("codec", ["codec=svd(energy"]),
    ("codec.energy", ["codec=svd(energy=2)"]),
    ("codec.up.update", ["codec.up.update=zip"]),
    ("codec.sideways.update", ["codec.sideways.update=svd"]),
    ("codec.update", ["codec.update=svd"]),
    ("collectives", ["collectives=ring"]),
    ("collectives", ["collectives=3"]),
    ("collectives.up", ["collectives.up=3"]),
    ("collectives.update", ["collectives.update=flat"]),
    ("collectives.up.update", ["collectives.up.update=star"]),
    # keys that do not go together
    ("participation", ["participation=11"]),
    ("min_replies", ["min_replies=6"]),
    ("min_replies", ["participation=3", "min_replies=4"]),
    ("transfer.public_epochs", ["transfer.lr=0.1"]),
    ("transfer.public_validation", ["transfer.public_validation=1.0"]),
    ("transfer.private_patience", ["transfer.private_patience=0"]),
    ("local.head_decay", ["local.head_decay=-1"]),
    ("data.only_classes.0", ["data.only_classes=[-1]"]),
    ("min_replies", ["algorithm.name=pooled", "min_replies=2"]),
    ("local.steps", ["local.steps=5", "local.epochs=1"]),
    ("local.momentum", ["local.optimizer=adam", "local.momentum=0.9"]),
    ("local.nesterov", ["local.nesterov=true"]),
    ("local.lr_decay", ["local.lr_decay=0.99"]),
    ("local.lr_step", ["local.lr_schedule=exponential", "local.lr_step=5"]),
    ("algorithm.option", ["algorithm.name=scaffold", "local.optimizer=adam"]),
    ("local.clip_norm", ["algorithm.name=scaffold", "local.clip_norm=10"]),
    ("algorithm", ["algorithm.name=scaffold", "local.precision=bfloat16"]),
    # overrides that are none
    ("rounds", ["rounds"]),
    ("rounds", ["rounds=3", "rounds=4"]),
    ("codec.up.update", ["codec.up.update=identity", "codec.up.update=identity"]),
    ("local.steps", ["local.steps=3", "local=3"]),
    ("codec.up.update", ["codec=svd", "codec.up.update=identity"]),
    ("local..lr", ["local..lr=0.1"]),
    ("lo cal.lr", ["lo cal.lr=0.1"]),
    ("'=3'", ["=3"]),
]


@uses_fakes
@pytest.mark.parametrize(
    ("key", "overrides"), MALFORMED, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_a_malformed_job_is_refused_by_name(key: str, overrides: list[str]) -> None:
    load(JOB)  # sound without them
    with pytest.raises(BadInput) as error:
        load(JOB, overrides)
    assert re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", str(error.value)), str(error.value)
    assert str(error.value).count("\n") == 0


@uses_fakes
@pytest.mark.parametrize(
    "key", ["rounds", "clients", "model", "data", "model.name", "data.name", "data.partition.alpha"]
)
def test_a_missing_key_is_named(key: str) -> None:
    document = json.loads(load(JOB).canonical())
    *tables, name = key.split(".")
    table = document
    for part in tables:
        table = table[part]
    del table[name]
    with pytest.raises(BadInput, match=rf"^{re.escape(key)}: is missing"):
        Job.from_canonical(json.dumps(document))


@pytest.mark.parametrize("text", ["rounds = ", "rounds = 1\nrounds = 2", "[local\nlr = 1", "clients = 1O", "a = 'b\n"])
def test_a_syntax_error_names_the_file_and_the_line(text: str) -> None:
    with pytest.raises(BadInput, match=r"^jobs/mine\.toml is not valid TOML: .*line \d"):
        load("seed = 1\n" + text, source="jobs/mine.toml")


@uses_fakes
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rounds=0", "rounds: must be at least 1, but the job says 0"),
        ("local.lr='x'", 'local.lr: must be a number, but the job says "x"'),
        ("sampling=unifrom", "sampling: must be 'uniform', 'examples' or 'bernoulli', but the job says \"unifrom\";"),
        ("sampling=unifrom", "did you mean `uniform`?"),
        ("lr=0.1", "did you mean `local.lr`?"),
        ("local.optimiser=sgd", "`local.optimiser` is not a key of [local]; did you mean `local.optimizer`? known: "),
        ("algorithm.muu=1", "`algorithm.muu` is not a key of FedProx; did you mean `algorithm.mu`? known: mu, name"),
        ("model.buffer=local", "did you mean `model.buffers`?"),
        ("model.name=mpl", "model.name: 'mpl' is not known; did you mean `mlp`?"),
        ("participation=11", "participation: 11 clients in a round, but clients is 10"),
    ],
)
def test_what_an_error_says(override: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        load(JOB, [override])
    assert said in str(error.value)


@uses_fakes
def test_every_fault_has_a_line() -> None:
    with pytest.raises(BadInput) as error:
        load(JOB, ["rounds=0", "local.lr=-1", "checkpoint.keep=1"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["rounds", "local.lr", "checkpoint.keep"]


# --- defaults and overrides -------------------------------------------------------------------------------------------
@uses_fakes
def test_one_epoch_is_the_default_and_steps_replace_it() -> None:
    text = JOB.replace("epochs = 2\n", "")
    assert (load(text).local.epochs, load(text).local.steps) == (1, None)
    job = load(JOB, ["local.steps=5"])
    assert (job.local.epochs, job.local.steps) == (None, 5)


@uses_fakes
def test_an_override_is_toml_or_else_a_bare_string() -> None:
    job = load(JOB, ["out=a b=c", "data.root=/data/mnist", "model.hidden=[1,2]", "participation = 1", "local.lr=1e-3"])
    assert (job.out, job.data.root, job.model.parameters["hidden"]) == ("a b=c", "/data/mnist", (1, 2))
    assert (job.participation, job.local.lr) == (1, 0.001)


@uses_fakes
def test_a_new_name_drops_the_parameters_of_the_old_one_whatever_the_order() -> None:
    assert load(JOB, ["algorithm.name=scaffold"]).algorithm.parameters == {"option": "II"}
    for overrides in (
        ["algorithm.option=I", "algorithm.name=scaffold"],
        ["algorithm.name=scaffold", "algorithm.option=I"],
    ):
        assert load(JOB, overrides).algorithm.parameters == {"option": "I"}
    assert load(JOB, ["algorithm.name=fedprox"]).algorithm.parameters == {"mu": 0.1}  # no change, nothing dropped


@uses_fakes
def test_a_new_data_set_keeps_the_folder_and_the_partition() -> None:
    data = load(JOB.replace('root = "somewhere"', 'root = "somewhere"\nvalidation = 0.1'), ["data.name=digits"]).data
    assert (data.name, data.root, data.partition.name, data.partition.parameters) == (
        "digits",
        "somewhere",
        "dirichlet",
        {"alpha": 0.5},
    )


@uses_fakes
def test_a_codec_for_one_field_or_for_all() -> None:
    assert load(JOB).codec_of("up", "update") == "svd(energy=0.9)"
    assert load(JOB).codec_of("down", "model") == "identity"
    assert load(JOB, ["codec=svd"]).codec_of("down", "model") == "svd"
    both = load(JOB, ["codec.down.model=svd"])
    assert both.codec == {"up.update": "svd(energy=0.9)", "down.model": "svd"}
    assert load(JOB, ["codec.up.update=identity"]).codec == {"up.update": "identity"}


def test_a_route_for_one_field_for_a_direction_or_for_all() -> None:
    assert load(JOB).route_of("up", "update") == "library"
    assert load(JOB, ["collectives=flat"]).route_of("down", "model") == "flat"
    job = load(JOB, ["collectives.up=tree", "collectives.up.update=hierarchical"])
    assert job.collectives == {"up": "tree", "up.update": "hierarchical"}
    assert get_args(Route) == ROUTES
    routes = [job.route_of(*field) for field in (("up", "update"), ("up", "counts"), ("down", "model"))]
    assert routes == ["hierarchical", "tree", "library"]
    assert load(job.to_toml()) == job


@uses_fakes
def test_one_client_is_not_all_clients() -> None:
    assert load(JOB, ["participation=1"]).most_participants == 1
    assert load(JOB, ["participation=1.0"]).most_participants == 10
    assert load(JOB, ["participation=1"]).sha256 != load(JOB, ["participation=1.0"]).sha256


@uses_fakes
def test_participants_are_counted_as_the_roster_counts_them() -> None:
    for clients in (1, 2, 3, 7, 10, 100):
        for fraction in (0.01, 0.05, 0.1, 0.25, 0.3, 0.35, 0.5, 0.75, 0.99, 1.0):
            job = load(JOB, [f"clients={clients}", f"participation={fraction}"])
            assert job.most_participants == roster.participants(fraction, clients)


@uses_fakes
def test_components_are_made_of_what_the_program_gives_and_the_job_says() -> None:
    job = load(JOB)
    assert job.algorithm.make() == FedProx(mu=0.1)
    assert job.model.make("spec") == ("mlp", "spec", (32, 16))
    assert job.data.make() == ("mnist", "somewhere")
    assert job.data.partition.make("labels", 10, None, None) == ("labels", 10, 0.5)
    assert load(JOB, ["data.name=digits"]).data.make() == "digits"  # takes no folder, and is given none


@uses_fakes
def test_ones_own_component_is_an_import_path() -> None:
    job = load(JOB, ["algorithm.name=fake_components:FedProx", "algorithm.mu=1"])
    assert job.algorithm.make() == FedProx(mu=1.0)


@uses_fakes
def test_a_job_cannot_be_changed() -> None:
    job = load(JOB)
    with pytest.raises(ValueError, match="frozen"):
        job.rounds = 3  # type: ignore[misc]
    job.algorithm.parameters["mu"] = 5.0
    assert job.algorithm.parameters == {"mu": 0.1}


# --- the same job or not ----------------------------------------------------------------------------------------------
@uses_fakes
def test_the_hash_is_of_the_meaning_not_of_the_text() -> None:
    shuffled = """\
    # another order, other spelling, comments, defaults spelled out
    clients = 10
    codec."up.update" = "svd(energy=0.9)"
    participation = 5e-1
    rounds = 20
    seed = 7
    out = "runs/one"
    threads = 1
    local = {lr = 0.05, epochs = 2, batch_size = 32, clip_norm = 0}
    data.partition = {alpha = 0.5, name = "dirichlet"}
    data.name = "mnist"
    data.root = "somewhere"
    [model]
    hidden = [
        32, 16 ]
    name = "mlp"
    buffers = "average"
    dropout = 0
    [algorithm]
    mu = 0.1
    name = 'fedprox'
    """
    assert load(shuffled) == load(JOB)
    assert load(shuffled).canonical() == load(JOB).canonical()
    assert load(shuffled).sha256 == load(JOB).sha256


UNHASHED_CHANGES = [
    "out=elsewhere",
    "data.root=elsewhere",
    "data.download=true",
    "data.share=off",
    "device=cpu",
    "share_gpus=true",
    "turns=off",
    "measure_wire=off",
    "collectives=flat",
    "round_timeout=5",
    "on_rank_death=shrink",
    "time_limit=5",
    "client_state_mb=1",
    "checkpoint.every_rounds=9",
    "checkpoint.every_seconds=9",
    "checkpoint.keep=9",
]
HASHED_CHANGES = [
    "seed=8",
    "clients=11",
    "participation=0.6",
    "sampling=bernoulli",
    "reduce=tree",
    "codec=identity",
    "min_replies=2",
    "threads=2",
    "algorithm.mu=0.2",
    "algorithm.name=fedavg",
    "model.hidden=[32]",
    "model.buffers=local",
    "data.name=digits",
    "data.partition.alpha=0.1",
    "local.lr=0.06",
    "local.steps=5",
    "local.precision=bfloat16",
    "evaluate.every_rounds=2",
    "client_models=[{name='mlp'}]",
    "data.public_classes=union",
    "data.public_held_out=0.25",
    "transfer.public_epochs=0",
    "data.only_classes=[2, 0]",
]


@uses_fakes
@pytest.mark.parametrize("change", UNHASHED_CHANGES)
def test_where_a_run_is_computed_is_not_hashed_and_may_change_on_resume(change: str) -> None:
    old, new = load(JOB), load(JOB, [change])
    assert old != new
    assert old.sha256 == new.sha256
    check_resume(old, new)


@uses_fakes
@pytest.mark.parametrize("change", HASHED_CHANGES)
def test_what_decides_the_results_is_hashed_and_may_not_change_on_resume(change: str) -> None:
    old, new = load(JOB), load(JOB, [change])
    assert old.sha256 != new.sha256
    with pytest.raises(BadInput, match=re.escape(change.split("=")[0].replace("steps", "epochs"))):
        check_resume(old, new)


@uses_fakes
def test_every_key_is_either_hashed_or_not_by_intent() -> None:
    changed = {change.split("=")[0] for change in [*UNHASHED_CHANGES, *HASHED_CHANGES]}
    assert {name for name in UNHASHED if not any(key == name or key.startswith(name + ".") for key in changed)} == set()
    top_level = {key for key in keys() if "." not in key}
    assert top_level - {key.split(".")[0] for key in changed} == {"rounds"}


PLAIN = "rounds = 1\nclients = 2\nalgorithm.name = 'fedavg'\nmodel.name = 'mlp'\ndata.name = 'digits'\n"


@pytest.mark.parametrize("name", ["fedavg", "fd", "fedkd"])
def test_a_transfer_that_nobody_begins_with_is_refused(name: str) -> None:
    models = ["client_models=[{name='mlp'}]"] if name == "fedkd" else []
    with pytest.raises(BadInput, match=rf"^transfer: {name} does not begin with what a transfer leaves"):
        load(PLAIN, [f"algorithm={{name='{name}'}}", *models, "transfer.public_epochs=0"])
    load(PLAIN, ["algorithm={name='local'}", "transfer.public_epochs=0"])


@uses_fakes
def test_a_run_can_be_resumed_for_more_rounds_but_not_for_fewer_than_are_done() -> None:
    old = load(JOB)
    check_resume(old, load(JOB, ["rounds=30"]), done=20)
    check_resume(old, load(JOB, ["rounds=15"]), done=15)
    with pytest.raises(BadInput, match=r"^rounds: 16 rounds are done already, but the job says 15"):
        check_resume(old, load(JOB, ["rounds=15"]), done=16)
    assert old.sha256 != load(JOB, ["rounds=30"]).sha256
    assert old.resume_sha256 == load(JOB, ["rounds=30"]).resume_sha256 != load(JOB, ["seed=8"]).resume_sha256
    cosine = ["local.lr_schedule=cosine"]
    assert load(JOB, cosine).resume_sha256 != load(JOB, [*cosine, "rounds=30"]).resume_sha256
    with pytest.raises(BadInput, match=r"rounds \(20 -> 30\)"):
        check_resume(load(JOB, cosine), load(JOB, [*cosine, "rounds=30"]))


# --- written and read again -------------------------------------------------------------------------------------------
@uses_fakes
@pytest.mark.parametrize("overrides", [[], ["local.steps=5"], ["codec=svd"], ["participation=1"], ["local.lr=1e-30"]])
def test_a_written_job_reads_as_an_equal_one(overrides: list[str]) -> None:
    job = load(JOB, overrides)
    assert load(job.to_toml()) == job
    assert Job.from_canonical(job.canonical()) == job
    assert load(job.to_toml()).canonical() == job.canonical()


@uses_fakes
def test_any_string_can_be_written() -> None:
    text = 'quote " backslash \\ tab \t newline \n delete \x7f bell \x07 ö 連 𝛼'
    job = load(JOB.replace('"runs/one"', json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")))
    assert job.out == text
    assert tomllib.loads(job.to_toml())["out"] == text


@uses_fakes
def test_a_canonical_text_is_validated_again() -> None:
    with pytest.raises(BadInput, match=r"^rounds: must be at least 1"):
        Job.from_canonical(load(JOB).canonical().replace('"rounds":20', '"rounds":0'))


# --- the jobs that come with mpifed, on the real components -----------------------------------------------------------
JOBS = sorted(path for path in (ROOT / "jobs").rglob("*.toml") if not is_sweep(path))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: str(path.relative_to(ROOT / "jobs")))
def test_a_job_of_ours_is_valid_and_survives_being_written(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "say in the first line what the job is, and where it is from"
    job = load(text, source=str(path))
    assert load(job.to_toml()) == job


def test_the_default_job_is_the_one_spelled_out() -> None:
    assert (ROOT / "jobs" / "digits.toml").read_text() == DEFAULT_JOB
    assert load(None) == load(DEFAULT_JOB)
    assert load(None).data.name == "digits"


def test_the_comparison_on_mnist_differs_in_the_algorithm_alone() -> None:
    folders = ("fedavg/mnist_cnn_dirichlet", "fedprox/mnist_cnn_dirichlet", "scaffold/mnist_cnn_dirichlet")
    jobs = [
        load((ROOT / "jobs" / f"{name}.toml").read_text()) for name in (*folders, "baselines/local", "baselines/pooled")
    ]
    assert len({json.dumps(json.loads(job.canonical()) | {"algorithm": None}) for job in jobs}) == 1
    assert {job.algorithm.name for job in jobs} == {"fedavg", "fedprox", "scaffold", "local", "pooled"}


def test_the_jobs_of_papers_have_the_papers_numbers() -> None:
    """100 clients, C = 0.1: 10 take part. EMNIST balanced: 112,800 / 100 = 1,128 = 4 x 226 + 224, so 5 steps."""
    fedavg = load((ROOT / "jobs/fedavg/paper_2nn.toml").read_text())
    assert (fedavg.clients, fedavg.most_participants, fedavg.local.batch_size, fedavg.local.epochs) == (100, 10, 10, 5)
    scaffold = load((ROOT / "jobs/scaffold/paper_emnist_similarity0.toml").read_text())
    assert scaffold.most_participants == 20 and -(-1128 // scaffold.local.batch_size) == 5


# --- components within components -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tuned(FedAvg):
    base: Any = None
    steps: int = 10


@pytest.fixture
def tuned(fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fake_components"], "Tuned", Tuned, raising=False)
    algorithms = importlib.import_module("mpifed.algorithms").ALGORITHMS
    monkeypatch.setitem(algorithms, "tuned", "fake_components:Tuned")


@pytest.mark.usefixtures("tuned")
@pytest.mark.parametrize(
    ("overrides", "base"),
    [
        ([], FedAvg()),
        (["algorithm.base=scaffold"], Scaffold("II")),
        (["algorithm.base={name='fedprox', mu=0.5}"], FedProx(0.5)),
        (["algorithm.base=fedprox", "algorithm.base_is_no_key=1"], None),
        (["algorithm.base.name=fedprox", "algorithm.base.mu=0.5"], FedProx(0.5)),
    ],
)
def test_an_algorithm_on_a_base(overrides: list[str], base: FedAvg | None) -> None:
    """The base's own parameters are bound and written down as the algorithm's are."""
    if base is None:
        with pytest.raises(BadInput, match=r"algorithm.base_is_no_key"):
            load(JOB, ["algorithm.name=tuned", *overrides])
        return
    job = load(JOB, ["algorithm.name=tuned", *overrides])
    assert job.algorithm.make() == Tuned(base, 10)
    assert load(job.to_toml()) == job == Job.from_canonical(job.canonical())


@pytest.mark.usefixtures("tuned")
def test_a_base_keeps_its_name_when_one_of_its_keys_is_overridden() -> None:
    text = load(JOB, ["algorithm.name=tuned", "algorithm.base={name='fedprox', mu=0.5}"]).to_toml()
    assert load(text, ["algorithm.base.mu=0.25"]).algorithm.make() == Tuned(FedProx(0.25), 10)
    assert load(text, ["algorithm.base.name=scaffold"]).algorithm.make() == Tuned(Scaffold("II"), 10)
    short = 'rounds=1\nclients=2\nalgorithm={name="tuned", base="fedprox"}\nmodel={name="mlp"}\ndata={name="digits"}'
    assert load(short, ["algorithm.base.mu=0.25"]).algorithm.make() == Tuned(FedProx(0.25), 10)


@pytest.mark.usefixtures("tuned")
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.base=nothing", r"^algorithm.base: 'nothing' is not known"),
        ("algorithm.base=tuned", r"^algorithm.base: 'tuned' is built on a base itself"),
        ("algorithm.base=3", r"^algorithm.base: must be the name of an algorithm or a table"),
        ("algorithm.base={name='fedprox', nu=1}", r"`algorithm.base.nu` is not a key of FedProx; .*mu"),
        ("algorithm.base={name='fedprox', mu=-1.0}", r"^algorithm.base.mu: .*at least 0"),
    ],
)
def test_a_malformed_base_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(JOB, ["algorithm.name=tuned", override])


@uses_fakes
def test_models_of_the_clients_own() -> None:
    job = load(JOB, ["client_models=[{name='mlp', hidden=[5]}, {name='resnet18', stem='cifar'}]"])
    assert [table.name for table in job.client_models] == ["mlp", "resnet18"]
    assert job.client_models[0].parameters == {"hidden": (5,), "dropout": 0.0}
    assert load(job.to_toml()) == job
    without = "\n".join(JOB.split("[model]")[0].splitlines()) + "\n[data]" + JOB.split("[data]", 1)[1]
    alone = load(without, ["client_models=[{name='mlp', hidden=[5]}]"])
    assert (alone.model.name, alone.model.parameters["hidden"]) == ("mlp", (5,))


@uses_fakes
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("client_models=[{name='mlpp'}]", r"^client_models.name: 'mlpp' is not known; did you mean `mlp`"),
        ("client_models=[{name='mlp', hiden=[5]}]", r"client_models.hiden. is not a key of mlp"),
        ("client_models=[{name='mlp', buffers='local'}]", r"client_models.buffers. is not a key of mlp"),
        ("client_models=mlp", r"^client_models: "),
        ("data.public.name=mnis", r"^data.public.name: 'mnis' is not known; did you mean `mnist`"),
        ("data.public={}", r"^data.public.name: is missing"),
        ("data.public_samples=-1", r"^data.public_samples: "),
        ("data.public_classes=both", r"^data.public_classes: "),
        ("data.public_held_out=1.0", r"^data.public_held_out: must be less than 1"),
        ("data={name='mnist', public={name='digits'}, public_held_out=0.5}", r"data.public_held_out: is a public set"),
    ],
)
def test_malformed_models_and_public_sets_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(JOB, [override])


# --- the reference page -----------------------------------------------------------------------------------------------
REFERENCE = (ROOT / "docs" / "job.md").read_text()
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in REFERENCE.splitlines()
    if line.startswith("| `") and len(cells := [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]) == 4
}


def test_the_reference_has_every_key_with_its_default_and_meaning() -> None:
    model: Any
    for key in keys():
        *tables, name = key.split(".")
        model = Job
        for table in tables:
            model = table_of(model.model_fields[table].annotation)
        field = model.model_fields[name]
        if table_of(field.annotation) is not None:
            assert f"\n## `[{key}]`" in REFERENCE, f"docs/job.md: no section [{key}]"
            continue
        assert key in ROWS, f"docs/job.md: no row for {key}"
        _, default, meaning = ROWS[key]
        written = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert default == ("" if field.default is None else written), key
        assert meaning == field.description, key


def test_the_reference_has_no_key_that_the_job_has_not() -> None:
    assert set(ROWS) <= set(keys())


@pytest.mark.parametrize("registry", ["algorithms.ALGORITHMS", "models.MODELS", "data.SOURCES", "data.PARTITIONS"])
def test_the_reference_has_the_components_with_their_parameters(registry: str) -> None:
    module, attribute = registry.split(".")
    kind = {"ALGORITHMS": AlgorithmTable, "MODELS": ModelTable, "SOURCES": DataTable, "PARTITIONS": PartitionTable}[
        attribute
    ]
    names = getattr(importlib.import_module(f"mpifed.{module}"), attribute)
    section = REFERENCE.split(f"\n## `[{kind.table}]`\n")[1].split("\n## ")[0]
    for name in names:
        row = re.search(rf"^\| `{re.escape(name)}` \| ([^|]*) \|", section, re.MULTILINE)
        if row is None and registry == "algorithms.ALGORITHMS":
            continue  # a new algorithm explains its keys in its own file; what the page says must still be true
        assert row, f"docs/job.md: no row for {kind.table}.name = {name}"
        expected = list(parameters(resolve(names, name, "name"), kind.given))
        assert re.findall(r"`(\w+)`", row[1]) == expected, f"docs/job.md: the parameters of {name} are {expected}"
