"""Find the function that a setting names as 'package.module:function', and say what was looked for where it fails."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FunctionError(ValueError):
    """A function that a setting names and that cannot be found or called."""


def load_function(spec: str, *, key: str, num_arguments: int, called: str) -> Callable[..., Any]:
    """Import `module:function` and check that it can be called.

    Args:
        spec: what the setting says.
        key: the setting, for messages.
        num_arguments: positional arguments that it will be called with.
        called: how it will be called, in words, for messages.

    Raises:
        FunctionError: the module or the function is missing, or takes other arguments.
    """
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        raise FunctionError(f"{key} = {spec!r}: expected 'package.module:function'")
    module = _import(module_name, f"{key} = {spec!r}")
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
        near = difflib.get_close_matches(function_name, names, n=1)
        found = "something that cannot be called" if hasattr(module, function_name) else "nothing of that name"
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FunctionError(
            f"{key} = {spec!r}: looked for the function {function_name!r} in {module.__file__} and found {found}{hint}"
        )
    _check_signature(function, num_arguments, f"{key} = {spec!r}: it is called {called}")
    return function  # type: ignore[no-any-return]


def _import(module_name: str, setting: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise FunctionError(
                f"{setting}: importing {module_name} failed, because it imports {error.name!r}, which is not installed"
            ) from error
        raise FunctionError(
            f"{setting}: looked for the module {error.name!r} on Python's path and did not find it; "
            f"put the folder that holds it on PYTHONPATH (current folder: {Path.cwd()})"
        ) from error
    except ImportError as error:
        raise FunctionError(f"{setting}: importing {module_name} failed: {error}") from error


def _check_signature(function: Callable[..., Any], num_arguments: int, what: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in callables have none
        return
    try:
        signature.bind(*[None] * num_arguments)
    except TypeError as error:
        raise FunctionError(f"{what}, but its signature is {signature} ({error})") from error
