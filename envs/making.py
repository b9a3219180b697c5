"""Classes and functions that make environments: found by their names, called with the arguments that the user gave."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.errors import described, unknown
from envs.user_modules import import_user_module
from tools import UserError

OURS = "envs.car_racing"  # a wrapper of our own, whatever goes by the name of envs where the user is


def load(path: str, asked: str) -> Callable:
    """Return the class or function that `package.module:name`, or `folder/file.py:name`, names.

    asked: what the user wrote, for messages. Raises UserError where there is none.
    """
    module_name, colon, name = path.rpartition(":")
    if not (module_name and colon and name):
        raise UserError(f"{asked} must look like package.module:Class")
    if module_name == OURS:
        return getattr(importlib.import_module(OURS), name)
    module_name = _beside(module_name, asked)
    module = import_user_module(module_name, asked)
    found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise unknown(f"class or function in {module_name}", name, found)
    if not callable(getattr(module, name)):
        kind = type(getattr(module, name)).__name__
        raise UserError(f"{asked}: {name} is an object ({kind}), expected the class or a function that makes one")
    return getattr(module, name)


def _beside(module_name: str, asked: str) -> str:
    """Return the name of the module that a path such as ./envs/cave.py is, and let Python find it."""
    if not module_name.endswith(".py") and "/" not in module_name:
        return module_name
    file = pathlib.Path(module_name if module_name.endswith(".py") else f"{module_name}.py").expanduser().resolve()
    if not file.is_file():
        raise UserError(f"{asked}: there is no file {file}")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    return file.stem


# ---------------------------------------------------------------------------
# Arguments


def make(maker: Callable, arguments: Mapping[str, Any], asked: str) -> Any:
    """Call what makes an environment. Raises UserError, with the place, if that fails."""
    try:
        return maker(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{asked} cannot be made: {described(error)}") from error


def fitting(maker: Callable, given: Mapping[str, Any], asked: str, known: Mapping[str, Any] | None = None) -> dict:
    """Return the arguments for what makes an environment: those given by --env.NAME, and `render_mode` if it draws.

    known: those that are given already. Raises UserError if it does not take one, or needs others.
    """
    known = known or {}
    parameters = parameters_of(maker)
    if parameters is None:
        return dict(given)
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        for name in given:
            if name not in named:
                takes = ", ".join(named) or "none"
                raise UserError(f"--env.{name}: {asked} takes no argument of that name (it takes {takes})")
    arguments = dict(given)
    if "render_mode" not in {**given, **known} and draws(maker, parameters):
        arguments["render_mode"] = "rgb_array"
    for name, p in parameters.items():
        if p.default is p.empty and name in named and name not in {**arguments, **known}:
            raise UserError(f"{asked} needs an argument '{name}': give it by --env.{name} VALUE")
    return arguments


def parameters_of(maker: Callable) -> Mapping[str, inspect.Parameter] | None:
    """Return what a class or function takes, None where Python cannot tell."""
    try:
        return inspect.signature(maker).parameters
    except (ValueError, TypeError):
        return None


def draws(maker: Callable, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """True if a class or function takes `render_mode`, and may take rgb_array for it."""
    metadata = getattr(maker, "metadata", None)
    modes = metadata.get("render_modes", ()) if isinstance(metadata, Mapping) else ()
    if "render_mode" in parameters:
        return not modes or "rgb_array" in modes
    return "rgb_array" in modes and any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def wrap(env: Any, paths: Sequence[str]) -> Any:
    """Put wrappers, `module:Wrapper` or a function, around an environment, the first innermost."""
    for path in paths:
        asked = f"--wrappers {path}"
        wrapper = load(path, asked)
        rest = list((parameters_of(wrapper) or {}).values())[1:]
        needed = [p.name for p in rest if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if needed:
            cure = "name a function of your own that gives them"
            raise UserError(f"{asked} needs more than an environment ({', '.join(needed)}): {cure}")
        try:
            env = wrapper(env)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{asked} does not go around {type(env).__name__}: {described(error)}") from error
    return env
