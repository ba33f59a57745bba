"""Say what is wrong with a configuration: the key, its value, where it came from, what is allowed, the nearest name."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.errors import UserError
from orchestrator.names import nearest
from orchestrator.toml_writer import format_value

CROSS_CHECK = "cross_check"
MAX_SHOWN_CHARACTERS = 60
LENGTHS = {"minItems": "at least", "maxItems": "at most"}
KEY_ITSELF = "[key]"  # pydantic's last step to a key of a table that is wrong, where the others name a value

Locate = Callable[[str], str]


def explain(error: ValidationError, model: type[BaseModel], locate: Locate) -> UserError:
    """The first problem of a failed validation as one error, with the keys of the others named.

    Args:
        error: what pydantic found.
        model: the model that was validated.
        locate: where the value of a dotted key came from.
    """
    found: dict[str, UserError] = {}
    for details in error.errors(include_url=False):
        key, problem = explain_one(details, model, locate)
        found.setdefault(key, problem)
    first, *others = found.items()
    key, problem = first
    more = f" (and wrong as well: {', '.join(name for name, _ in others)})" if others else ""
    return UserError(problem.message + more, place=problem.place, remedy=problem.remedy)


def explain_one(details: ErrorDetails, model: type[BaseModel], locate: Locate) -> tuple[str, UserError]:
    """The key that one of pydantic's errors is about, and the error in our words."""
    if details["type"] == CROSS_CHECK:
        context = details.get("ctx", {})
        key = str(context["key"])
        return key, UserError(str(context["message"]), place=locate(key), remedy=str(context["remedy"]))
    path, owner = _walk(model, details["loc"])
    if path[-1] == KEY_ITSELF:
        return _wrong_name(path[:-1], details, locate)
    key = ".".join(path)
    if details["type"] == "extra_forbidden":
        return key, unknown_key(path, owner, model, place=locate(key))
    if details["type"] == "missing":
        takes = allowed_values(owner, path[-1])
        return key, UserError(f"{key} is missing", place=locate(key), remedy=f"{key} = {takes}")
    if isinstance(item := details["loc"][-1], int) and path[-1] in owner.model_fields:
        return key, _wrong_item(f"{key}[{item}]", path[-1], owner, details["input"], place=locate(key))
    if len(path) > 1 and path[-1] not in owner.model_fields and path[-2] in owner.model_fields:
        takes = _describe(owner.model_json_schema()["properties"][path[-2]].get("additionalProperties", {}))
        return key, UserError(f"{key} = {_shown(details['input'])} is not allowed", place=locate(key), remedy=takes)
    return key, _wrong_value(key, path[-1], owner, details["input"], place=locate(key))


def unknown_key(path: Sequence[str], owner: type[BaseModel], model: type[BaseModel], *, place: str) -> UserError:
    """An error that names the nearest key: in the same section first, then anywhere."""
    *parents, name = path
    prefix = ".".join(parents)
    what = f"unknown key {name!r} in [{prefix}]" if prefix else f"unknown section or key {name!r}"
    near = nearest(name, list(owner.model_fields)) if prefix else None
    if near is not None:
        return UserError(what, place=place, remedy=f"{prefix}.{near}")
    dotted = list(dotted_keys(model))
    same_name = [key for key in dotted if key.rpartition(".")[2] == name]
    sections = list(model.model_fields)
    anywhere = same_name[0] if same_name else (nearest(name, sections) if not prefix else None)
    if len(parents) < 2:  # a table with a name of the user's takes its own keys only
        anywhere = anywhere or nearest(".".join(path), dotted) or _nearest_last_name(name, dotted)
    if anywhere is not None:
        return UserError(what, place=place, remedy=anywhere)
    choices = ", ".join(owner.model_fields if prefix else sections)
    return UserError(what, place=place, remedy=f"one of {choices}")


def dotted_keys(model: type[BaseModel]) -> Iterator[str]:
    """All "section.key" names of a model of sections."""
    for section, field in model.model_fields.items():
        inner = _model_inside(field.annotation)
        if inner is not None:
            yield from (f"{section}.{key}" for key in inner.model_fields)


def allowed_values(model: type[BaseModel], name: str) -> str:
    """The values a field takes, in words: type, choices and range."""
    return _describe(model.model_json_schema()["properties"][name])


def _nearest_last_name(name: str, dotted: Sequence[str]) -> str | None:
    by_last_name = {key.rpartition(".")[2]: key for key in reversed(dotted)}
    near = nearest(name, list(by_last_name))
    return None if near is None else by_last_name[near]


def _wrong_name(path: Sequence[str], details: ErrorDetails, locate: Locate) -> tuple[str, UserError]:
    """A table whose name, which is the user's to choose, is none."""
    *parents, name = path
    key, pattern = ".".join(path), details.get("ctx", {}).get("pattern")
    remedy = f"text matching {pattern}" if pattern else "another name"
    return key, UserError(f"{name!r} is no name for a table of [{'.'.join(parents)}]", place=locate(key), remedy=remedy)


def _wrong_value(key: str, name: str, owner: type[BaseModel], value: Any, *, place: str) -> UserError:
    if name not in owner.model_fields:
        return UserError(
            f"{key} = {_shown(value)} has the wrong type", place=place, remedy="atoll config schema tells what it takes"
        )
    if _model_inside(owner.model_fields[name].annotation) is not None:
        remedy = f"[{key}] in a file, --set {key}.<name>=<value> on the command line"
        if typing.get_origin(owner.model_fields[name].annotation) is dict:
            remedy = f"[{key}.<name>] in a file, at least one"
        return UserError(f"{key} = {_shown(value)}: {key} is a table of settings", place=place, remedy=remedy)
    field, takes = owner.model_fields[name], allowed_values(owner, name)
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        remedy = takes
    else:
        remedy = "leave it out" if default is None else f"the default, {_shown(default)}"
    nearest_value = _nearest_bound(field, value)
    remedy = remedy if nearest_value is None else f"{nearest_value:g}, the nearest that is allowed"
    remedy += f" ({field.description.rstrip('.')})" if field.description else ""
    if isinstance(value, int | float) and takes.startswith("text"):
        remedy = f'quotes: {key} = "{value}" in a file, --set \'{key}="{value}"\' on the command line'
    return UserError(f"{key} = {_shown(value)} is not allowed: it takes {takes}", place=place, remedy=remedy)


def _wrong_item(key: str, name: str, owner: type[BaseModel], value: Any, *, place: str) -> UserError:
    """One value of a list that is not what the others have to be."""
    takes = _describe(owner.model_json_schema()["properties"][name].get("items", {}))
    return UserError(f"{key} = {_shown(value)} is not allowed", place=place, remedy=takes)


def _nearest_bound(field: FieldInfo, value: object) -> float | None:
    """The inclusive limit that a number is beyond; None where it is not that which is wrong."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    for limit in field.metadata:
        if isinstance(limit, Ge) and value < limit.ge:  # type: ignore[operator]
            return float(limit.ge)  # type: ignore[arg-type]
        if isinstance(limit, Le) and value > limit.le:  # type: ignore[operator]
            return float(limit.le)  # type: ignore[arg-type]
    return None


def _walk(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The names of a location without pydantic's tags for unions, and the model that owns the last one."""
    path: list[str] = []
    owner: type[BaseModel] = model
    inside: type[BaseModel] | None = model
    names_follow = False
    for part in map(str, location):
        if names_follow:
            path.append(part)
            names_follow = False
            continue
        if inside is None:
            break
        path.append(part)
        owner = inside
        if part not in inside.model_fields:
            break
        annotation = inside.model_fields[part].annotation
        inside = _model_inside(annotation)
        names_follow = typing.get_origin(annotation) is dict
    return path, owner


def _model_inside(annotation: Any) -> type[BaseModel] | None:
    """The model in `Model`, `Model | None` or `dict[str, Model]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        inner = _model_inside(argument)
        if inner is not None:
            return inner
    return None


def _describe(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _range(schema)
    if kind == "string":
        return f"text matching {schema['pattern']}" if "pattern" in schema else "text"
    if kind == "array":
        limits = [f"{word} {schema[name]}" for name, word in LENGTHS.items() if name in schema]
        return "a list" + " of" * bool(limits) + " " * bool(limits) + " and ".join(limits)
    return {"boolean": "true or false", "object": "a table"}.get(str(kind), "another type")


def _range(schema: dict[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[name]}" for name, word in words.items() if name in schema]
    return "".join(f" {limit}" for limit in limits)


def _shown(value: Any) -> str:
    try:
        text = format_value(value)
    except ValueError:
        text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."
