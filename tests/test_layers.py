"""Rules on the code: layers of imports, sizes of files and functions, no unused option, no hard-coded device."""

import ast
import pathlib
import re

import pytest

from envs import SUITES
from tests.factories import SPACES, initial, make_batch, make_config, make_dreamer
from training.config import Config, load_config

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = {"tests", "benchmarks", "docs", "inference_video", "export", "doctor"}  # these may import all layers
LAYERS = [
    {"tools"},
    {"specs", "ops"},
    {"replay", "modalities", "networks"},
    {"training", "envs", "rssm"},
    {"models"},
    {"explorers"},
    {"behaviors"},
    {"agents", "sweeps"},
    {"dreamer", "sweep"},
]
PACKAGES = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists() and path.name not in OUTSIDE]


def layer(path):
    """Return the first part of a file's path below the root: `envs` for envs/dmc.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for path in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    if layer(path) not in OUTSIDE
}
NAMES = {layer(ROOT / file) for file in FILES} | OUTSIDE


def imports(tree):
    """Yield the top-level names that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield node.module.split(".")[0]


def test_every_file_has_a_layer():
    assert {layer(ROOT / file) for file in FILES} <= set.union(*LAYERS)


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_the_layers_below_its_own(file):
    own = layer(ROOT / file)
    level = next(i for i, names in enumerate(LAYERS) if own in names)
    below = set.union(set(), *LAYERS[:level])
    allowed = below | ({own} if (ROOT / own).is_dir() else set())  # files of one package may import each other
    assert set(imports(FILES[file])) & NAMES <= allowed


def test_training_is_handed_the_agent_and_the_environments():
    allowed = {"training", "tools", "specs", "replay"}
    for file in FILES:
        if layer(ROOT / file) == "training":
            assert set(imports(FILES[file])) & NAMES <= allowed, file


def test_the_root_holds_few_files():
    names = {path.name for path in ROOT.glob("*.py")}
    parts = {"models.py", "networks.py", "rssm.py", "specs.py", "tools.py"}
    assert names == {"dreamer.py", "sweep.py", "inference_video.py", "export.py", "doctor.py"} | parts
    assert not (ROOT / "dreamer").exists()  # it would shadow dreamer.py


def length(node):
    return node.end_lineno - node.lineno + 1


def test_functions_fit_a_screen_and_classes_a_head():
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert length(node) <= 60, f"{file}: {node.name} has {length(node)} lines"
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                assert len(methods) <= 15 or layer(ROOT / file) in ("envs", "replay"), f"{file}: {node.name}"


def test_packages_of_suites_are_imported_only_when_asked_for():
    # A missing package of one suite must not affect the others.
    packages = {"dm_control", "mujoco", "ale_py", "crafter", "cv2", "minerl", "bsuite", "minigrid", "popgym", "procgen"}
    packages |= {"memory_maze", "deepmind_lab", "gym"}
    lazy = {module.replace(".", "/") + ".py" for module, *_ in SUITES.values()}
    for file in FILES.keys() - lazy:
        top = [node for node in FILES[file].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not set(imports(ast.Module(top, []))) & packages, file


def test_packages_that_messages_name_are_those_of_the_requirements():
    named, pinned = set(), set()
    for file in ("envs", "training", "benchmarks"):
        for path in (ROOT / file).glob("*.py"):
            named |= set(re.findall(r"-r (requirements[\w./-]*\.txt)", path.read_text()))
            pinned |= set(re.findall(r"([A-Za-z_][\w-]*)==[\w.]+", path.read_text()))
    assert len(named) > 10 and all((ROOT / name).is_file() for name in named)
    assert pinned == {"minerl"}  # which needs what no requirements can bring


# ---------------------------------------------------------------------------
# Options


class Spy:
    """Wrap a Config and record which keys are read."""

    def __init__(self, config, read, prefix=""):
        self.config, self.read, self.prefix = config, read, prefix

    def __getattr__(self, name):
        value = getattr(self.config, name)
        if isinstance(value, Config):
            return Spy(value, self.read, f"{self.prefix}{name}.")
        if name == "to_dict":  # a section that is passed whole
            self.read.update(f"{self.prefix}{key}" for key in self.config.to_dict())
        self.read.add(f"{self.prefix}{name}")
        return value


def leaves(tree, prefix=""):
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]


DEFAULTS = load_config([], ROOT / "configs.yaml")
KEYS = list(leaves(DEFAULTS.to_dict()))


def names_in(tree):
    """Yield attributes, parts of strings, and parameters: all the ways to read an option."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.split(".")  # "encoder.cnn_keys"
        elif isinstance(node, ast.arg):
            yield node.arg


USED = {
    name
    for file, tree in FILES.items()
    if file not in ("training/config.py", "training/settings.py")
    for name in names_in(tree)
}


def test_every_option_is_read_somewhere():
    assert [key for key in KEYS if key.split(".")[-1] not in USED] == []


def test_the_agent_reads_every_option_of_its_parts():
    read = set()
    for flags in ([], ["--actor.grad", "mixed"]):
        agent = make_dreamer(*SPACES["mixed"], Spy(make_config(*flags), read))
        agent.loss(make_batch("mixed"), initial(agent))
    parts = ("rssm", "decoder", "reward_head", "cont_head", "actor", "critic", "return_norm", "opt", "loss_scales")
    own = {key for key in KEYS if key.split(".")[0] in parts}
    own |= {"encoder.layers", "encoder.units", "encoder.depth", "encoder.mults", "encoder.kernel"}
    own |= {"free_nats", "imag_horizon", "horizon", "lam"}
    assert own - read == set()


def test_every_loss_scale_belongs_to_a_loss():
    scales = set(DEFAULTS.loss_scales.to_dict())
    assert scales == {"rec", "reward", "cont", "dyn", "rep", "policy", "value", "repval"}


# ---------------------------------------------------------------------------
# Devices


def is_cuda(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")


def chosen_devices(tree):
    """Yield lines that name a CUDA device: .cuda(), device="cuda", .to("cuda"), def f(device="cuda")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            method = getattr(node.func, "attr", None)
            given = [*(word.value for word in node.keywords if word.arg == "device")]
            given += node.args if method in ("to", "device", "Generator", "autocast") else []
            if method == "cuda" or any(map(is_cuda, given)):
                yield node.lineno
        elif isinstance(node, ast.arguments):
            yield from (default.lineno for default in [*node.defaults, *node.kw_defaults] if is_cuda(default))


@pytest.mark.parametrize("code", ["x.cuda()", "f(device='cuda:0')", "x.to('cuda')", "def f(device='cuda'): pass"])
def test_a_chosen_device_is_found(code):
    assert list(chosen_devices(ast.parse(code)))


@pytest.mark.parametrize("file", sorted(set(FILES) - {"dreamer.py"}))
def test_the_device_is_chosen_in_the_entry_alone(file):
    assert list(chosen_devices(FILES[file])) == []
