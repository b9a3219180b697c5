"""Count the code that one update of the default agent runs through, which a reader has to read to understand it.

    python3 benchmarks/reading.py

Counts files and lines of the functions that an update enters, on images and vectors, without ops/ (efficient
building blocks, which can be read later), blank lines, comments and docstrings.
"""

import ast
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/reading.py")  # before the first package is imported

import numpy as np
import torch
from gymnasium.spaces import Box

from agents.dreamer import Dreamer
from modalities import obs_spec
from specs import act_spec
from training.config import CONFIGS, load_config

ROOT = pathlib.Path(__file__).parents[1]

OBS = {"image": Box(0, 255, (64, 64, 3), np.uint8), "state": Box(-1, 1, (4,))}
ACTIONS = {"action": Box(-1, 1, (2,))}


def entered():
    """Return {(file, first line)} of the project's functions that one update enters."""
    config = load_config(["--configs", "debug"], CONFIGS)
    agent = Dreamer(obs_spec(OBS), act_spec(ACTIONS), config)
    rng, lead = np.random.default_rng(0), (2, 4)
    batch = {key: rng.integers(0, 2, (*lead, *space.shape)).astype(space.dtype) for key, space in OBS.items()}
    batch |= {"action": np.zeros((*lead, 2), np.float32), "reward": np.zeros(lead, np.float32)}
    batch |= {flag: np.zeros(lead, bool) for flag in ("is_first", "is_last", "is_terminal")}
    batch = {key: torch.from_numpy(value) for key, value in batch.items()}
    state, found = agent.world.rssm.initial(2, "cpu"), set()

    def note(frame, event, arg):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and ROOT in path.parents:
            found.add((path.relative_to(ROOT), frame.f_code.co_firstlineno))

    sys.setprofile(note)
    try:
        agent.update(batch, state)
    finally:
        sys.setprofile(None)
    return {(file, line) for file, line in found if file.parts[0] not in ("ops", ".venv", "benchmarks")}


def lines_of(file, starts):
    """Return the lines of code of the functions of a file that start at some lines, each counted once."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if first in starts:
            lines |= set(range(first, node.end_lineno + 1)) - docstring(node)
    code = {number for number in lines if text.splitlines()[number - 1].split("#")[0].strip()}
    return len(code)


def docstring(node):
    """Return the lines of a function's docstring."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return set(range(body[0].lineno, body[0].end_lineno + 1))
    return set()


def count():
    """Return {file: lines of code} that one update enters."""
    starts = {}
    for file, line in entered():
        starts.setdefault(file, set()).add(line)
    return {str(file): lines_of(file, lines) for file, lines in sorted(starts.items())}


if __name__ == "__main__":
    found = count()
    for file, lines in found.items():
        print(f"{lines:5}  {file}")
    print(f"{sum(found.values()):5}  lines in {len(found)} files")
