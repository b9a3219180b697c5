"""The shape of the project: what may import what, no dead option, no device chosen in secret."""

import ast
import pathlib

import pytest

from agents.dreamer import Dreamer
from envs import SUITES
from tests.test_agent import SPACES, make_batch, make_config
from training.config import Config, load_config

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = {"tests", "benchmarks", "docs", "inference_video"}  # they stand above all layers
LAYERS = [
    {"tools"},
    {"specs", "ops"},
    {"replay", "modalities", "networks"},
    {"models", "exploration", "envs"},
    {"behaviors"},
    {"agents"},
    {"training"},
    {"dreamer"},
]
PACKAGES = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists() and path.name not in OUTSIDE]


def layer(path):
    """The first part of a file's name below the root: `envs` for envs/dmc.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for path in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
    if layer(path) not in OUTSIDE
}
NAMES = {layer(ROOT / file) for file in FILES} | OUTSIDE


def imports(tree):
    """The layers that a file imports, anywhere in it."""
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
    allowed = below | ({own} if (ROOT / own).is_dir() else set())  # the files of a directory know each other
    assert set(imports(FILES[file])) & NAMES <= allowed


def test_packages_of_suites_are_imported_only_when_asked_for():
    # A package of a suite that is not installed must not matter to the others.
    packages = {"dm_control", "mujoco", "ale_py", "crafter", "cv2", "minerl", "bsuite", "minigrid", "popgym", "procgen"}
    packages |= {"memory_maze", "deepmind_lab", "gym"}
    lazy = {module.replace(".", "/") + ".py" for module, *_ in SUITES.values()}
    for file in FILES.keys() - lazy:
        top = [node for node in FILES[file].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not set(imports(ast.Module(top, []))) & packages, file


# ---------------------------------------------------------------------------
# Options


class Spy:
    """Reads like a Config and remembers which keys were read."""

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
    """Attributes, strings that are no docstrings, and parameters: all the ways to read an option."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from node.value.split(".")  # "encoder.cnn_keys"
        elif isinstance(node, ast.arg):
            yield node.arg


USED = {name for file, tree in FILES.items() if file != "training/config.py" for name in names_in(tree)}


def test_every_option_is_read_somewhere():
    assert [key for key in KEYS if key.split(".")[-1] not in USED] == []


def test_the_agent_reads_every_option_of_its_parts():
    read = set()
    agent = Dreamer(*SPACES["mixed"], Spy(make_config(), read))
    agent.loss(make_batch("mixed"), agent.world.rssm.initial(3, "cpu"))
    parts = ("rssm", "decoder", "reward_head", "cont_head", "actor", "critic", "return_norm", "opt", "loss_scales")
    own = {key for key in KEYS if key.split(".")[0] in parts}
    own |= {"encoder.layers", "encoder.units", "encoder.depth", "encoder.mults", "encoder.kernel"}
    own |= {"free_nats", "imag_horizon", "horizon", "lam"}
    assert own - read == set()


def test_every_loss_scale_belongs_to_a_loss():
    scales = set(DEFAULTS.loss_scales.to_dict())
    assert scales == {"rec", "reward", "cont", "dyn", "rep", "policy", "value", "repval", "disag"}


# ---------------------------------------------------------------------------
# Devices


def is_cuda(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")


def chosen_devices(tree):
    """Places where a CUDA device is asked for by name: .cuda(), device="cuda", .to("cuda"), def f(device="cuda")."""
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
