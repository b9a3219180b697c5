"""What must be installed for a run, and one line that says how where it is not. Runs without packages, on old Pythons.

pyproject.toml names this file as what builds the project, to say that it is not to be built.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = (3, 11)
# What requirements.txt brings.
NEEDED = ("torch", "numpy", "ruamel.yaml", "gymnasium", "tensorboard", "cv2", "imageio", "rich", "filelock")
# What load_agent does not import.
APART = ("benchmarks", "docs", "doctor", "dreamer", "export", "inference_video", "sweep", "sweeps", "tests")
NOT_BUILT = (
    "this project is run from its folder, not installed: its modules (envs, models, tools, ...) would lie beside those "
    "of other packages. In {root} run: make .venv/core && .venv/bin/python dreamer.py --help; for load_agent in your "
    "own programs: PYTHONPATH={root} .venv/bin/python yours.py"
)


def demand(program):
    """End the process with exit status 2 and one line on stderr if Python is too old or a package is missing.

    program: what the user started, a path within the project such as dreamer.py.
    """
    said = problem(program)
    if said:
        sys.stderr.write(f"{program}: {said}\n")
        sys.exit(2)


def problem(program):
    """Return what keeps `program` from running, with the cure, or an empty text."""
    old = sys.version_info < PYTHON
    missing = [] if old else [name for name in NEEDED if not is_there(name)]
    if not old and not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    why = f"{', '.join(missing)} {verb} not installed for {sys.executable}"
    if old:
        why = "Python {}.{} or newer is needed, and this is {}.{}".format(*PYTHON, *sys.version_info[:2])
    own = os.path.join(ROOT, ".venv")
    if os.path.exists(os.path.join(own, "core")) and os.path.realpath(sys.prefix) != os.path.realpath(own):
        return f"{why}: run .venv/bin/python {program}, or source .venv/bin/activate first"
    make = f"make {'PYTHON=python3.11 ' * old}.venv/core"
    return f"{why}: run {make}, then .venv/bin/python {program} (or pip install -r requirements.txt)"


def check_names():
    """Raise ImportError if Python has, or finds, somebody else's module by a name of ours: load_agent would get it."""
    for name in sorted(entry.removesuffix(".py") for entry in os.listdir(ROOT)):
        ours = os.path.join(ROOT, name)
        if name in APART or not (os.path.isfile(f"{ours}.py") or os.path.isfile(os.path.join(ours, "__init__.py"))):
            continue
        spec = PathFinder.find_spec(name)
        found = getattr(sys.modules.get(name), "__file__", None) or (spec and spec.origin)
        if found and not os.path.realpath(found).startswith(os.path.join(os.path.realpath(ROOT), "")):
            raise ImportError(f"{found}: rename it: {ROOT} has its own {name}, and Python knows one of a name")


def is_there(name):
    """Return True if a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # the package that it lies in is missing, or it is held back
        return False


def build_wheel(*_, **__):
    """Refuse to be built, as pip is told in one line."""
    sys.exit(NOT_BUILT.format(root=ROOT))


build_editable = build_sdist = build_wheel
# What pip asks for first: its report is the shortest then.
get_requires_for_build_wheel = get_requires_for_build_editable = get_requires_for_build_sdist = build_wheel
