"""Spaces as people have them: nested ones, and those of packages that are like Gymnasium."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from tools import UserError

LONGEST = 1024  # characters of a text whose space does not tell

# Name of a class in another package, such as the old gym -> what makes Gymnasium's of it.
FOREIGN = {
    "Box": lambda s: spaces.Box(s.low, s.high, s.shape, np.dtype(s.dtype).type),
    "Discrete": lambda s: spaces.Discrete(int(s.n), start=int(getattr(s, "start", 0))),
    "MultiDiscrete": lambda s: spaces.MultiDiscrete(s.nvec, start=getattr(s, "start", None)),
    "MissionSpace": lambda s: spaces.Text(LONGEST),  # MiniGrid's sentences
    "MultiBinary": lambda s: spaces.MultiBinary(s.n if hasattr(s, "n") else s.shape),
    "Dict": lambda s: spaces.Dict({key: modern(child) for key, child in s.spaces.items()}),
    "Tuple": lambda s: spaces.Tuple([modern(child) for child in s.spaces]),
}


def modern(space: Any, where: str = "a space") -> spaces.Space:
    """Return a space as Gymnasium's, if it is of a package that is like it. Raises UserError for what is no space.

    where: whose space it is, for the message.
    """
    if isinstance(space, spaces.Space) and all(kind.__name__ != "MissionSpace" for kind in type(space).__mro__):
        return space
    for kind in type(space).__mro__:
        if kind.__name__ in FOREIGN:
            try:
                return FOREIGN[kind.__name__](space)
            except (AttributeError, TypeError, ValueError, AssertionError):
                break
    if callable(space):
        raise UserError(f"{where} is a method, expected a space: an environment of one agent has it as an attribute")
    found = "None" if space is None else f"a {type(space).__module__}.{type(space).__name__}"
    raise UserError(f"{where} is {found}, expected a space of Gymnasium, there before the first reset")


def flatten_space(space: spaces.Space, bare: str, path: str = "") -> dict[str, spaces.Space]:
    """Return the leaves of a nested space. Raises UserError if two would have the same name, as a/b and a: {b}."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return {path or bare: modern(space)}
    leaves: dict[str, spaces.Space] = {}
    for _, below, child in _children(space, bare, path):
        more = flatten_space(child, bare, below)
        for key in more.keys() & leaves.keys():
            raise UserError(f"the space has '{key}' twice: nested names are joined by '/', give one another name")
        leaves |= more
    return leaves


def flatten(space: spaces.Space, tree: Any, bare: str, path: str = "") -> dict[str, Any]:
    """Return the leaves of a tree shaped like `space` as one dict. Raises ValueError if one is missing."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return {path or bare: tree}
    leaves: dict[str, Any] = {}
    if isinstance(space, spaces.Tuple) and hasattr(tree, "__len__") and len(tree) != len(space):
        raise ValueError(f"the observation '{path or bare}' has {len(tree)} parts where its space has {len(space)}")
    for name, below, child in _children(space, bare, path):
        try:
            part = tree[name]
        except (KeyError, IndexError, TypeError):
            there = f", which has {sorted(map(str, tree))}" if isinstance(tree, dict) else ""
            found = f"the observation '{below}' is in the environment's space and not in what it gives{there}"
            raise ValueError(found) from None
        leaves |= flatten(child, part, bare, below)
    return leaves


def nest(space: spaces.Space, leaves: dict[str, Any], bare: str, path: str = "") -> Any:
    """Undo `flatten`."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return leaves[path or bare]
    tree = {name: nest(child, leaves, bare, below) for name, below, child in _children(space, bare, path)}
    return tree if isinstance(space, spaces.Dict) else tuple(tree.values())


def _children(space, bare, path):
    """Return (name or index, path, space) of each member of a dict or tuple at `path`."""
    if isinstance(space, spaces.Dict):
        return [(name, f"{path}/{name}" if path else str(name), child) for name, child in space.items()]
    return [(index, f"{path or bare}/{index}", child) for index, child in enumerate(space)]
