"""Names and parameters of a job against what they name."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mpifed.component import bind, resolve
from mpifed.errors import BadInput


@dataclass(frozen=True)
class Base:
    mu: Annotated[float, Field(ge=0, le=10)] = 0.01


@dataclass(frozen=True)
class Prox(Base):
    option: Literal["I", "II"] = "II"
    steps: Annotated[int, Field(ge=1)] = 1
    clip: float | None = None
    schedule: list[int] = field(default_factory=lambda: [1, 2])


class Plain:
    def __init__(self, width: int, *, copy: bool = False) -> None:
        self.width, self.copy = width, copy


def factory(spec: Any, *, hidden: Sequence[int] = (64,), kernel: tuple[int, int] = (3, 3), loose=1) -> None:
    """A model factory: `spec` is given by the program, `loose` has no annotation."""


REGISTRY = {"path": "pathlib:Path", "joined": "os:path.join", "prox": f"{__name__}:Prox", "gone": "no.such.module:A"}


# --- resolve ----------------------------------------------------------------------------------------------------------
def test_a_known_name_is_imported() -> None:
    import os

    assert resolve(REGISTRY, "path", "model.name") is Path
    assert resolve(REGISTRY, "joined", "model.name") is os.path.join


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(BadInput) as error:
        resolve(REGISTRY, "porx", "algorithm.name")
    assert "algorithm.name" in str(error.value)
    assert "did you mean `prox`?" in str(error.value)
    assert "gone, joined, path, prox" in str(error.value)


@pytest.mark.parametrize("name", ["gone", "no.such:A", "os:no_such", "os:", ":A", "os:sep", ""])
def test_what_cannot_be_imported_or_called_is_bad_input(name: str) -> None:
    with pytest.raises(BadInput, match=r"^data\.name: "):
        resolve(REGISTRY, name, "data.name")


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_components_of_today.py").write_text("def model(spec): return spec\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as under a console script
    assert resolve({}, "my_components_of_today:model", "model.name")(3) == 3
    monkeypatch.delitem(sys.modules, "my_components_of_today")


# --- bind -------------------------------------------------------------------------------------------------------------
def test_defaults_are_filled_in_inherited_ones_too() -> None:
    assert bind(Prox, {"option": "I"}, "algorithm") == {
        "mu": 0.01,
        "option": "I",
        "steps": 1,
        "clip": None,
        "schedule": [1, 2],
    }


def test_what_bind_returns_makes_the_object() -> None:
    assert Prox(**bind(Prox, {"mu": 1}, "algorithm")) == Prox(mu=1.0)
    assert Plain(**bind(Plain, {"width": 3, "copy": True}, "model")).copy is True


def test_a_whole_number_serves_as_a_float_and_becomes_one() -> None:
    mu = bind(Prox, {"mu": 1}, "algorithm")["mu"]
    assert mu == 1.0 and type(mu) is float


def test_given_parameters_are_the_programs() -> None:
    assert set(bind(factory, {}, "model", given={"spec"})) == {"hidden", "kernel", "loose"}
    with pytest.raises(BadInput, match=r"`model\.spec` is not a key of factory"):
        bind(factory, {"spec": 1}, "model", given={"spec"})


def test_a_default_left_out_equals_the_same_written_out() -> None:
    written = {"hidden": [64], "kernel": [3, 3], "loose": 1}
    assert bind(factory, written, "model", given={"spec"}) == bind(factory, {}, "model", given={"spec"})
    assert bind(factory, written, "model", given={"spec"})["kernel"] == (3, 3)


def test_an_unknown_key_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(BadInput) as error:
        bind(Prox, {"muu": 1.0}, "algorithm", siblings=("name",))
    text = str(error.value)
    assert text.startswith("`algorithm.muu` is not a key of Prox; did you mean `algorithm.mu`? known: ")
    assert "clip, mu, name, option, schedule, steps" in text


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BadInput, match=r"^model\.width: is missing"):
        bind(Plain, {}, "model")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mu", "0.1", 'must be a number, but the job says "0.1"'),
        ("mu", True, "must be a number, but the job says true"),
        ("mu", -0.5, "must be at least 0, but the job says -0.5"),
        ("mu", 11, "must be at most 10, but the job says 11"),
        ("mu", math.nan, "must be a finite number, but the job says NaN"),
        ("mu", math.inf, "must be a finite number, but the job says Infinity"),
        ("mu", [0.1], "must be a number, but the job says [0.1]"),
        ("steps", 1.0, "must be an integer, but the job says 1.0"),
        ("steps", True, "must be an integer, but the job says true"),
        ("steps", "3", 'must be an integer, but the job says "3"'),
        ("steps", 0, "must be at least 1, but the job says 0"),
        ("option", "III", "must be 'I' or 'II', but the job says \"III\"; did you mean `II`?"),
        ("option", 2, "must be 'I' or 'II', but the job says 2"),
        ("schedule", [1, "x"], 'must be an integer, but the job says "x"'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: Any, said: str) -> None:
    with pytest.raises(BadInput) as error:
        bind(Prox, {key: value}, "algorithm")
    assert str(error.value) == f"algorithm.{key}: {said}"


def test_every_fault_has_a_line() -> None:
    with pytest.raises(BadInput) as error:
        bind(Prox, {"mu": -1, "steps": 0}, "algorithm")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["algorithm.mu", "algorithm.steps"]
