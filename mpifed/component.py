"""Names in a job become Python objects: look up (`resolve`) and check the parameters against the signature (`bind`).

A leaf: it knows no algorithm, model or data set. What a component accepts is said once, by its own annotations, such as
`mu: Annotated[float, Field(ge=0)] = 0.01`; the job's keys are checked against them, so a component declares no schema.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Optional, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from mpifed.errors import BadInput

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

_PHRASES = (  # pydantic's wording -> the wording of a job's errors, applied in this order
    ("Value error, ", ""),
    ("Input should be ", "must be "),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("a valid integer", "an integer"),
    ("a valid number", "a number"),
    ("a valid string", "a string"),
    ("a valid boolean", "true or false"),
    ("a valid array", "an array"),
    ("a valid tuple", "an array"),
    ("a valid list", "an array"),
    ("an object", "a table"),
)


# --- names ------------------------------------------------------------------------------------------------------------
def resolve(registry: Mapping[str, str], name: str, key: str) -> Callable[..., Any]:
    """The class or function called `name`, imported now.

    `registry` maps names to `"module:attribute"`. A name with a colon is the user's own import path, also from the
    current folder. Raises `BadInput` naming `key` where the name is unknown or cannot be imported.
    """
    path = name if ":" in name else registry.get(name)
    if path is None:
        raise BadInput(
            f"{key}: '{name}' is not known;{_nearest(name, registry)} known: {', '.join(sorted(registry)) or 'none'};"
            " your own is written 'package.module:attribute'"
        )
    module_name, _, attribute = path.partition(":")
    folder = os.getcwd()
    if "" not in sys.path and folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the user never hides a library
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"{key}: '{path}' cannot be imported: {error}") from error
    if not callable(target):
        raise BadInput(f"{key}: '{path}' is neither a class nor a function")
    return target


def unknown_key(key: str, known: Iterable[str], owner: str) -> BadInput:
    """The error for a dotted `key` that is not among `known` (the keys of its table), with the nearest one."""
    table, _, name = key.rpartition(".")
    prefix = f"{table}." if table else ""
    names = sorted(known)
    listed = ", ".join(names) or "none"
    return BadInput(f"`{key}` is not a key of {owner};{_nearest(name, names, prefix)} known: {listed}")


def _nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" did you mean `{prefix}{close[0]}`?" if close else ""


# --- parameters -------------------------------------------------------------------------------------------------------
def bind(
    target: Callable[..., Any],
    params: Mapping[str, Any],
    key: str,
    given: Collection[str] = (),
    siblings: Collection[str] = (),
) -> dict[str, Any]:
    """`params` checked against the parameters of `target` (a function, a class or a dataclass), defaults filled in.

    Parameters named in `given` are filled by the program: no keys of the user, and left out of the result. `siblings`
    are further keys of the same table, read elsewhere, to be listed where a key is unknown. Values are those that TOML
    or JSON can hold: a whole number serves as a float and an array as a tuple, and nothing else is converted; NaN and
    infinities are refused. Raises `BadInput` naming the dotted key, the value and what is allowed.
    """
    accepted = parameters(target, given)
    for name in params:
        if name not in accepted:
            raise unknown_key(f"{key}.{name}", [*accepted, *siblings], _name(target))
    # Aliases, because a parameter may have a name that pydantic keeps for itself (`copy`, `model_x`, `_x`).
    fields: dict[str, Any] = {
        f"field_{index}": (annotation, Field(default, alias=name))
        for index, (name, (annotation, default)) in enumerate(accepted.items())
    }
    model: type[BaseModel] = create_model("Parameters", __config__=_STRICT, **fields)
    try:
        # By way of JSON: there, strict means "the type as written", and an array may become a tuple.
        checked = model.model_validate_json(json.dumps(dict(params)))
        # Once more with the defaults, so that one left out and the same written out give equal values.
        checked = model.model_validate_json(checked.model_dump_json(by_alias=True))
    except ValidationError as error:
        raise BadInput(explain(error, lambda place: f"{key}.{place[0]}")) from error
    except PydanticSerializationError as error:
        raise BadInput(f"{key}: {_name(target)} has a default that no job can hold: {error}") from error
    return {name: getattr(checked, field) for field, name in zip(fields, accepted, strict=True)}


def accepts(target: Callable[..., Any], parameter: str) -> bool:
    """Whether `target` has a parameter of that name."""
    return parameter in inspect.signature(target).parameters


def parameters(target: Callable[..., Any], given: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Name -> (annotation, default or `...`) of every parameter that can be given by keyword."""
    if dataclasses.is_dataclass(target) and isinstance(target, type):
        # Through the class, because inherited annotations mean what they mean in their own module.
        hints = get_type_hints(target, include_extras=True)
        factories = {
            field.name: field.default_factory()
            for field in dataclasses.fields(target)
            if field.default_factory is not dataclasses.MISSING
        }
    else:
        call: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = get_type_hints(call if inspect.isroutine(call) else type(call).__call__, include_extras=True)
        factories = {}
    found: dict[str, tuple[Any, Any]] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in given or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        annotation = hints.get(name, Any)
        default = ... if parameter.default is parameter.empty else factories.get(name, parameter.default)
        found[name] = (Optional[annotation] if default is None else annotation, default)  # noqa: UP045
    return found


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", type(target).__name__)


# --- errors -----------------------------------------------------------------------------------------------------------
def explain(error: ValidationError, key: Callable[[tuple[int | str, ...]], str]) -> str:
    """pydantic's errors as one line per key: the dotted key (`key(place)`), what is allowed, and what the job says."""
    reasons: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for item in error.errors(include_url=False):
        name = key(item["loc"])
        reason = item["msg"]
        for theirs, ours in _PHRASES:
            reason = reason.replace(theirs, ours)
        if item["type"] == "missing":
            reason = "is missing"
        elif item["type"] == "literal_error" and isinstance(item["input"], str):
            allowed = [part.strip("'") for part in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            reason += _hint(item["input"], allowed)
        else:
            values[name] = item["input"]
        if reason not in reasons.setdefault(name, []):
            reasons[name].append(reason)
    return "\n".join(
        f"{name}: {' or '.join(parts)}" + (f", but the job says {_shown(values[name])}" if name in values else "")
        for name, parts in reasons.items()
    )


def _hint(value: str, allowed: list[str]) -> str:
    return f", but the job says {_shown(value)};{_nearest(value, allowed)}".removesuffix(";")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
