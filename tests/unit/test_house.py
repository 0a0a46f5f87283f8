"""The rules of the house, kept by reading the source: who may import whom, and what nobody may call.

Each rule is a function from modules to offences (`file:line: what is wrong`), with one test on `mpifed/` and one bad
snippet that it must catch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LEAVES = (
    "mpifed.types",
    "mpifed.errors",
    "mpifed.rng",
    "mpifed.component",
    "mpifed.job",
    "mpifed.data.partition",
    "mpifed.models",
    "mpifed.codecs",
    "mpifed.comm.ledger",
    "mpifed.comm.routes",
)
ALGORITHMS_MAY_IMPORT = ("mpifed.algorithms", "mpifed.types", "mpifed.learning", "mpifed.models", "mpifed.rng")
REPORT_NEVER_REACHES = ("mpifed.engine", "mpifed.journal", "mpifed.comm", "mpifed.algorithms", "torch", "mpi4py")
ENGINE = ("mpifed.engine", "mpifed.journal")
"""The round loop, and what rank 0 shows and writes of it: the top of the house."""
ENGINE_USERS = ("mpifed.run", "mpifed.survival", "mpifed.__main__", "mpifed.export", "mpifed.predict.trial")
PICKLERS = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
PICKLED_MPI_CALLS = {"send", "ssend", "bsend", "isend", "issend", "ibsend", "recv", "irecv", "sendrecv"} | {
    "mprobe", "improbe", "bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan",
}  # fmt: skip


# --- reading the source -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Module:
    """One source file: dotted name, file as shown in a failure, syntax tree."""

    name: str
    file: str
    tree: ast.Module

    @classmethod
    def parse(cls, file: str, text: str) -> Module:
        name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        return cls(name, file, ast.parse(text, file))

    def imports(self) -> Iterator[tuple[str, int]]:
        """(dotted name, line) of all imports, inside functions too; `from a import b` gives `a` and `a.b`."""
        package = self.name if self.file.endswith("__init__.py") else self.name.rpartition(".")[0]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")
                    base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], base]))
                yield base, node.lineno
                yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """(dotted name as written, call) of every call; an unnamed receiver such as `f().g()` is `?.g`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield _dotted(node.func), node

    def at(self, line: int, offence: str) -> str:
        return f"{self.file}:{line}: {offence}"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def _inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def _read(folder: Path) -> list[Module]:
    files = sorted(folder.rglob("*.py"))
    return [Module.parse(file.relative_to(folder.parent).as_posix(), file.read_text("utf-8")) for file in files]


MODULES = _read(ROOT / "mpifed")


# --- the rules --------------------------------------------------------------------------------------------------------
def mpi4py_only_in_comm_mpi(modules: list[Module]) -> list[str]:
    return [
        module.at(line, "imports mpi4py; only mpifed/comm/mpi.py does, ask its communicator")
        for module in modules
        for name, line in module.imports()
        if _inside(name, ("mpi4py",)) and module.name != "mpifed.comm.mpi"
    ]


def h5py_only_in_storage_and_data(modules: list[Module]) -> list[str]:
    return [
        module.at(line, "imports h5py; only mpifed/storage and mpifed/data do")
        for module in modules
        for name, line in module.imports()
        if _inside(name, ("h5py",)) and not _inside(module.name, ("mpifed.storage", "mpifed.data"))
    ]


def nothing_is_unpickled_or_evaluated(modules: list[Module]) -> list[str]:
    offences = []
    for module in modules:
        for name, line in module.imports():
            if _inside(name, (*PICKLERS, "torch.load", "torch.save")):
                offences.append(module.at(line, f"imports {name}; loading must never execute what a file holds"))
        for name, call in module.calls():
            if name in ("eval", "exec", "builtins.eval", "builtins.exec"):
                offences.append(module.at(call.lineno, f"calls {name}"))
            if name in ("torch.load", "torch.save"):
                offences.append(module.at(call.lineno, f"calls {name}, which pickles; use mpifed.storage"))
            for keyword in call.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not allowed:
                    offences.append(module.at(call.lineno, f"{name} with allow_pickle"))
    return offences


def buffers_only_on_the_wire(modules: list[Module]) -> list[str]:
    return [
        module.at(call.lineno, f"{name}: mpi4py's lower-case calls pickle; use the upper-case one on a buffer")
        for module in modules
        if module.name == "mpifed.comm.mpi"
        for name, call in module.calls()
        for receiver, _, method in [name.rpartition(".")]
        if method in PICKLED_MPI_CALLS and receiver not in ("", "self", "functools")
    ]


def leaves_import_leaves(modules: list[Module]) -> list[str]:
    return [
        module.at(line, f"a leaf imports {name}; leaves import only leaves ({', '.join(LEAVES)})")
        for module in modules
        if _inside(module.name, LEAVES)
        for name, line in _of_mpifed(module, modules)
        if not _inside(name, LEAVES)
    ]


def algorithms_see_no_engine(modules: list[Module]) -> list[str]:
    return [
        module.at(line, f"an algorithm imports {name}; it may import {', '.join(ALGORITHMS_MAY_IMPORT)}")
        for module in modules
        if _inside(module.name, ("mpifed.algorithms",))
        for name, line in _of_mpifed(module, modules)
        if not _inside(name, ALGORITHMS_MAY_IMPORT)
    ]


def report_starts_without_the_engine(modules: list[Module]) -> list[str]:
    """Directly or through other modules."""
    by_name = {module.name: module for module in modules}
    offences = []
    pending = [(module, "") for module in modules if _inside(module.name, ("mpifed.report",))]
    seen = {module.name for module, _ in pending}
    while pending:
        module, way = pending.pop()
        for name, line in module.imports():
            if _inside(name, REPORT_NEVER_REACHES):
                offences.append(module.at(line, f"the report reaches {name}{way}"))
            elif name in by_name and name not in seen:
                seen.add(name)
                pending.append((by_name[name], f" by way of {module.file}:{line}{way}"))
    return offences


def engine_is_at_the_top(modules: list[Module]) -> list[str]:
    return [
        module.at(line, f"imports {name}; only {', '.join(ENGINE_USERS)} do")
        for module in modules
        for name, line in _of_mpifed(module, modules)
        if _inside(name, ENGINE) and not _inside(module.name, (*ENGINE_USERS, *ENGINE))
    ]


def modules_say_what_they_are_for(modules: list[Module]) -> list[str]:
    """An empty `__init__.py` has nothing to say."""
    return [
        module.at(1, "has no module docstring")
        for module in modules
        if module.tree.body
        and not module.name.rpartition(".")[2].startswith("_")
        and not ast.get_docstring(module.tree)
    ]


def _of_mpifed(module: Module, modules: list[Module]) -> Iterator[tuple[str, int]]:
    """The modules of mpifed that a module imports: `from mpifed.types import State` is `mpifed.types` alone."""
    names = {other.name for other in modules}
    for name, line in module.imports():
        if name in names and name != "mpifed":
            yield name, line


# --- the tests --------------------------------------------------------------------------------------------------------
Rule = Callable[[list[Module]], list[str]]

BAD: list[tuple[Rule, str, str]] = [
    (mpi4py_only_in_comm_mpi, "mpifed/engine.py", "def world():\n    from mpi4py import MPI"),
    (h5py_only_in_storage_and_data, "mpifed/models/zoo.py", "import numpy\nimport h5py.h5f"),
    (nothing_is_unpickled_or_evaluated, "mpifed/job.py", "import os\nfrom pickle import loads"),
    (nothing_is_unpickled_or_evaluated, "mpifed/job.py", "import torch\nx = torch.load('x', weights_only=True)"),
    (nothing_is_unpickled_or_evaluated, "mpifed/job.py", "import numpy as np\nnp.load('x.npy', allow_pickle=True)"),
    (nothing_is_unpickled_or_evaluated, "mpifed/job.py", "text = '1'\nexec(text)"),
    (buffers_only_on_the_wire, "mpifed/comm/mpi.py", "def f(self):\n    self._comm.bcast({})"),
    (buffers_only_on_the_wire, "mpifed/comm/mpi.py", "def f(self):\n    MPI.COMM_WORLD.isend(1, 0)"),
    (leaves_import_leaves, "mpifed/models/zoo.py", "import torch\nfrom mpifed.engine import run"),
    (leaves_import_leaves, "mpifed/models/zoo.py", "import torch\nfrom .. import engine"),
    (algorithms_see_no_engine, "mpifed/algorithms/own.py", "import torch\nfrom mpifed import engine"),
    (report_starts_without_the_engine, "mpifed/report/page.py", "import json\nimport torch.nn"),
    (engine_is_at_the_top, "mpifed/storage/states.py", "import os\nfrom mpifed.engine import run"),
    (engine_is_at_the_top, "mpifed/federation/plan.py", "import os\nimport mpifed.journal"),
    (modules_say_what_they_are_for, "mpifed/own.py", "x = 1"),
]
TOP = [Module.parse(name.replace(".", "/") + ".py", "") for name in ENGINE]
RULES = list(dict.fromkeys(rule for rule, _, _ in BAD))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_is_kept(rule: Rule) -> None:
    offences = dict.fromkeys(rule(MODULES))
    assert not offences, "\n" + "\n".join(offences)


@pytest.mark.parametrize(("rule", "file", "text"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_the_rule_can_be_broken(rule: Rule, file: str, text: str) -> None:
    """The offence stands in the last line of each snippet."""
    offences = rule([*TOP, Module.parse(file, text)])
    assert offences
    assert offences[0].startswith(f"{file}:{len(text.splitlines())}: ")


def test_the_report_reaches_nothing_through_others() -> None:
    modules = [
        Module.parse("mpifed/report/page.py", "import mpifed.storage.states"),
        Module.parse("mpifed/storage/states.py", "import os\nimport torch"),
    ]
    expected = "mpifed/storage/states.py:2: the report reaches torch by way of mpifed/report/page.py:1"
    assert report_starts_without_the_engine(modules) == [expected]


def test_what_is_allowed_is_not_an_offence() -> None:
    """The neighbours of what is forbidden: a model's `eval()`, numpy without pickle, upper-case MPI, a lazy import."""
    good = [
        Module.parse("mpifed/comm/mpi.py", '"""."""\nfrom mpi4py import MPI\nMPI.COMM_WORLD.Bcast(1)\nself.gather(1)'),
        Module.parse("mpifed/algorithms/own.py", '"""."""\nfrom mpifed.learning.local import train\nmodel.eval()'),
        Module.parse("mpifed/models/zoo.py", '"""."""\nfrom mpifed.types import Layout\nfrom . import flat'),
        Module.parse(
            "mpifed/storage/states.py", '"""."""\nimport h5py\nimport numpy as np\nnp.load("x", allow_pickle=False)'
        ),
        Module.parse("mpifed/export.py", '"""."""\ndef main():\n    from mpifed.engine import run'),
        Module.parse("mpifed/empty/__init__.py", ""),
    ]
    assert [offence for rule in RULES for offence in rule(good)] == []


def test_the_report_command_loads_neither_torch_nor_mpi() -> None:
    """What the source promises, at run time: `mpifed report` starts fast."""
    program = (
        "import sys, mpifed.report.command; print(sorted({'torch', 'mpi4py', 'mpifed.engine'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_no_file_names_a_place_of_one_machine() -> None:
    """A path of the machine on which a file was written means nothing on another."""
    place = "/" + "work/"
    folders = ["mpifed", "tests", "docs", "jobs", "slurm", "benchmarks", ".ci"]
    files = [*ROOT.glob("[!.]*.*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    caches = (".mypy_cache", ".ruff_cache", ".pytest_cache", "__pycache__")
    texts = (
        file
        for file in files
        if file.is_file() and file.suffix not in (".h5", ".png") and not any(part in caches for part in file.parts)
    )
    offences = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in texts
        for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1)
        if place in line
    ]
    assert not offences, "\n" + "\n".join(offences)
