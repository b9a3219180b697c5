"""Modules of the user's own, kept apart from those of this project that bear the same names.

Python knows one module of a name. Where a folder with a `tools.py` or an `envs/` of the user's is added to the places
where Python looks, `import tools` in it would give this project's without a word, or this project would get theirs. So
names of ours always mean ours, and a user's file that means one of theirs by such a name is refused before it runs.
"""

from __future__ import annotations

import ast
import importlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from envs.errors import described, one_line
from tools import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = {
    *(
        "agents",
        "behaviors",
        "benchmarks",
        "docs",
        "doctor",
        "dreamer",
        "envs",
        "explorers",
        "export",
        "inference_video",
        "modalities",
    ),
    *("models", "networks", "ops", "replay", "rssm", "specs", "sweep", "sweeps", "tests", "tools", "training"),
}
STDLIB = pathlib.Path(os.__file__).parent
INSTALLED = {"site-packages", "dist-packages"}
STRAY = {"benchmarks", "docs", "tests"}  # what careless wheels install beside their package, which no user means
DYNAMIC = {"import_module", "__import__"}
NAME = re.compile(r"\w[\w.]*")
ENTRY = re.compile(r"\w[\w.]*:\w+")  # how Gymnasium's registry and others name what to import later


def import_user_module(name: str, asked: str) -> ModuleType:
    """Import a module of the user's from the working directory or wherever else Python looks.

    Args:
      name: of the module, with dots; asked: what named it, such as "custom_cave:Env", for messages.
    Raises: UserError, one line, if it cannot be imported, or if it or a file of the user's that it imports, then or
      later, means a module of the user's by a name that is one of ours.
    """
    if not all(name.split(".")) or "/" in name:
        raise UserError(f"{asked}: '{name}' is no module: expected a name such as package.module, not a path")
    search_working_directory()
    check_names(name, asked)
    known = list(sys.path)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        check_names(name, asked, known)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{asked}: '{name}' cannot be imported: {reason(error, name)}") from error
    check_names(name, asked, known)
    return module


def reason(error: BaseException, name: str) -> str:
    """Return in one line why a module could not be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"{one_line(error)} in {os.getcwd()} or on PYTHONPATH: start from the folder that holds it"
    return described(error)


class OursFirst:
    """Finds modules of our names in our folder, wherever else Python would look first."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in OURS else None


def search_working_directory() -> None:
    """Let Python look in the working directory too: a script finds what lies beside it, not where it is called."""
    if OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, OursFirst)
    if os.getcwd() not in sys.path:
        own = str(ROOT)
        sys.path.insert(sys.path.index(own) + 1 if own in sys.path else 0, os.getcwd())


# ---------------------------------------------------------------------------
# Names of ours in a user's files


def check_names(name: str, asked: str, known: list[str] | None = None) -> None:
    """Raise UserError if the user's files, from module `name` on, mean others of their own by names of ours.

    known: after the import, the places where Python looked before it: only if it has added some, they are looked at.
    """
    if known == sys.path or pathlib.Path.cwd() == ROOT:  # in our own folder, our names are ours
        return
    found = clashes(name)
    if found:
        said = [f"{file} (imported in {importer.name})" if importer else str(file) for file, importer in found.items()]
        why = "dreamer.py has its own by the same name, and Python knows one of a name"
        raise UserError(f"{asked}: rename {', '.join(sorted(said))}: {why}")


def clashes(name: str) -> dict[pathlib.Path, pathlib.Path | None]:
    """Return {file or folder of the user's that goes by a name of ours: the file that imports it, None for `name`}."""
    importlib.invalidate_caches()
    here = pathlib.Path.cwd()
    found: dict[pathlib.Path, pathlib.Path | None] = {}
    todo: list[tuple[str, pathlib.Path | None]] = [(name, None)]
    seen, read = set(todo), set()
    while todo:
        wanted, importer = todo.pop()
        places = [place for place in sys.path if pathlib.Path(place).resolve() != ROOT]
        above = importer.parents if importer else []
        places += [str(folder) for folder in above if folder == importer.parent or folder.is_relative_to(here)]
        top = wanted.split(".")[0]
        if top in OURS:
            theirs = place_of(PathFinder.find_spec(top, places))
            if theirs and not (top in STRAY and INSTALLED & set(theirs.parts)):
                found.setdefault(theirs, importer)
            continue
        for file, package in files_of(wanted, places):
            if file not in read and is_users(file):
                read.add(file)
                new = {(other, file) for other in imported(file, package)} - seen
                seen |= new
                todo += new
    return found


def files_of(name: str, places: list[str]) -> Iterator[tuple[pathlib.Path, str]]:
    """Yield the source files that importing a dotted name runs, each with the package that its dots are relative to."""
    search: list[str] | None = places
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        spec = PathFinder.find_spec(full, search)
        if spec is None:
            return
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
        if spec.origin and spec.origin.endswith(".py"):
            yield pathlib.Path(spec.origin), full if search is not None else full.rpartition(".")[0]
        if search is None:
            return


def place_of(spec: ModuleSpec | None) -> pathlib.Path | None:
    """Return the file or folder of a module, or None if there is none: a folder without Python files is no module."""
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return pathlib.Path(spec.origin) if spec.origin else None
    folders = [pathlib.Path(folder) for folder in spec.submodule_search_locations]
    return next((folder for folder in folders if spec.origin or any(folder.rglob("*.py"))), None)


def is_users(file: pathlib.Path) -> bool:
    """True unless a file belongs to Python, to an installed package, or to this project."""
    ours = file.parent == ROOT or any(file.is_relative_to(ROOT / name) for name in OURS)
    return not (ours or INSTALLED & set(file.parts) or file.is_relative_to(STDLIB))


def imported(file: pathlib.Path, package: str) -> Iterator[str]:
    """Yield the absolute dotted names that a file imports, anywhere in it; none if it cannot be read."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # which its import will tell
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names)) if base else ()
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in DYNAMIC:
            texts = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from (text for text in texts if isinstance(text, str) and NAME.fullmatch(text))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ENTRY.fullmatch(node.value):
            yield node.value.partition(":")[0]
