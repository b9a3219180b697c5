"""Modules of a user's own beside those of this project: what bears a name of ours is refused, in one line."""

import pathlib
import sys
import textwrap

import pytest

import dreamer
from envs import make_env
from envs.user_modules import OURS, ROOT, OursFirst
from tests.factories import env_config as make_config
from tests.factories import one_line_error

CAVE = """
    import numpy as np
    from gymnasium import Env as Base
    from gymnasium import spaces

    class Env(Base):
        observation_space = spaces.Box(-1, 1, (3,))
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.zeros(3, np.float32), {}

        def step(self, action):
            return np.zeros(3, np.float32), 1.0, True, False, {}
"""


@pytest.fixture(autouse=True)
def no_cave_of_other_tests(monkeypatch):
    monkeypatch.delitem(sys.modules, "cave", raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a function that writes {path: text} into the working directory; modules imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = set(sys.modules)

    def write(**files):
        for name, text in {"cave": CAVE, **files}.items():
            path = tmp_path / (name if name.endswith(".py") else f"{name}.py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refused(task="custom_cave:Env"):
    return one_line_error(make_env, make_config(task), "train", 0)


def test_our_names_are_all_that_stand_in_our_folder():
    def is_module(path):
        return path.suffix == ".py" if path.is_file() else any(path.glob("*.py"))

    found = {path.stem for path in ROOT.iterdir() if not path.name.startswith(".") and is_module(path)}
    assert found <= OURS and {name for name in OURS if not (ROOT / name).exists()} == {
        path.stem for path in ROOT.glob("*.py")
    }


@pytest.mark.parametrize("name", sorted(OURS))
def test_an_import_of_a_users_file_with_a_name_of_ours_is_refused(folder, name):
    place = folder(cave=f"import {name}\n" + textwrap.dedent(CAVE), **{name: ""})
    assert f"rename {place / name}.py (imported in cave.py)" in refused()
    assert not any(str(place) in str(getattr(module, "__file__", "")) for module in list(sys.modules.values()))


@pytest.mark.parametrize(
    "line",
    [
        "from tools import derive_seed",
        "import tools as mine",
        "import numpy, tools",
        "def late():\n    import tools",
        "try:\n    from tools import nothing\nexcept ImportError:\n    pass",
        "import importlib\nmine = importlib.import_module('tools')",
        "mine = __import__('tools')",
        "import gymnasium\ngymnasium.register('Cave-v0', entry_point='tools:Env')",
    ],
)
def test_however_it_is_imported(folder, line):
    place = folder(cave=line + "\n" + textwrap.dedent(CAVE), tools="def derive_seed(x): return 0.5")
    assert str(place / "tools.py") in refused()


def test_also_where_only_a_file_of_the_users_imports_it(folder):
    place = folder(
        cave="import helper\n" + textwrap.dedent(CAVE),
        **{"helper": "from parts import wall", "parts/__init__": "", "parts/wall": "from . import stone"},
        **{"parts/stone": "from models import Net", "models/net": "class Net: pass"},
    )
    assert f"{place / 'models'} (imported in stone.py)" in refused()


def test_a_package_with_a_name_of_ours_that_the_task_names_is_refused(folder):
    place = folder(**{"envs/cave": CAVE, "replay/__init__": ""})
    assert f"custom_envs.cave:Env: rename {place / 'envs'}:" in refused("custom_envs.cave:Env")


def test_a_module_beside_its_importer_counts_also_below_the_working_directory(folder):
    place = folder(**{"lab/__init__": "", "lab/cave": "import specs\n" + textwrap.dedent(CAVE), "lab/specs": ""})
    assert str(place / "lab" / "specs.py") in refused("custom_lab.cave:Env")


def test_a_folder_that_the_users_module_adds_to_the_path_counts(folder):
    line = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent / 'lib'))\nimport ops\n"
    place = folder(cave=line + textwrap.dedent(CAVE), **{"lib/ops": ""})
    assert str(place / "lib" / "ops.py") in refused()


def test_what_nobody_imports_is_no_matter(folder):
    place = folder(tools="raise SystemExit", networks="raise SystemExit", **{"envs/__init__": ""})
    (place / "models").mkdir()
    (place / "models" / "wall.stl").write_text("solid")
    make_env(make_config("custom_cave:Env"), "train", 0)
    assert OursFirst.find_spec("networks").origin == str(ROOT / "networks.py")


def test_a_folder_without_python_files_is_no_module_and_relative_imports_are_the_users_own(folder):
    place = folder(**{"lab/__init__": "", "lab/cave": "from .tools import one\n" + textwrap.dedent(CAVE)})
    (place / "lab" / "tools.py").write_text("one = 1")
    (place / "models").mkdir()
    make_env(make_config("custom_lab.cave:Env"), "train", 0)
    assert sys.modules["lab.tools"].one == 1


def test_a_users_module_may_import_ours(folder):
    folder(cave="from tools import derive_seed\n" + textwrap.dedent(CAVE))
    make_env(make_config("custom_cave:Env"), "train", 0)


def test_stray_folders_among_installed_packages_are_no_users(folder, monkeypatch):
    place = folder(cave="import tests, replay\n" + textwrap.dedent(CAVE))
    for name in ("tests", "replay"):
        (place / "site-packages" / name).mkdir(parents=True)
        (place / "site-packages" / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(place / "site-packages"))
    said = refused()
    assert (
        f"{place / 'site-packages' / 'replay'} (imported" in said and str(place / "site-packages" / "tests") not in said
    )


@pytest.mark.parametrize(
    "task, text, hint",
    [
        ("custom_cave:Env", "def broken(:", "cave.py, line 1)"),
        ("custom_cave:Env", "raise ValueError('no\\nlicence')", "'cave' cannot be imported: ValueError: no licence"),
        ("custom_cave:Env", "import sys\nsys.exit()", "'cave' cannot be imported: SystemExit"),
        ("custom_cave:Env", "import no_such", "No module named 'no_such'"),
        ("custom_./cave.py:Env", "import no_such", "'cave' cannot be imported"),
        ("custom_.cave:Env", "", "expected a name such as package.module, not a path"),
        ("custom_cage:Env", "", "start from the folder that holds it"),
        ("gym_cage:Env-v0", "", "start from the folder that holds it"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(folder, task, text, hint):
    folder(cave=text)
    assert hint in refused(task)


@pytest.mark.parametrize("parallel", ["false", "true"])
def test_a_run_ends_in_one_line_and_writes_nothing(folder, parallel, capsys):
    place = folder(cave="from tools import derive_seed\n" + textwrap.dedent(CAVE), tools="def derive_seed(x): return 1")
    argv = ["--configs", "debug", "--logdir", "run", "--parallel", parallel, "--task", "custom_cave:Env"]
    assert dreamer.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"rename {place / 'tools.py'} (imported in cave.py)" in said
    assert not pathlib.Path("run").exists()
