import json
import os
import pickle
import re
import subprocess
import sys

import pytest

import tools
from training.config import CONFIGS, RETIRED, Config, help_text, load_config, load_presets, yaml12
from training.settings import TAKEN

YAML = """\
# What is above the defaults is no section
defaults:  # what a run does unless told otherwise
  # A full-line comment is no help line
  task: {default: dummy_multi, help: suite and task}
  logdir: {default: null, help: where to write; null for nowhere}
  steps: {default: 1e6, help: environment frames of the run}
  lr: {default: 4e-5, help: learning rate}
  eps: {default: 1e-20, help: floor}
  ratio: {default: 512.0, help: replayed steps per agent step}
  envs: {default: 1, min: 1, help: environments}
  batch_size: {default: 16, help: sequences in a batch}
  compile: {default: true, help: compile the update}
  device: {default: auto, choices: [auto, cpu, cuda, "cuda:N"], help: where networks live}
  precision: {default: 32, choices: [16, 32], help: bits of a float}
  size: {default: [64, 64], length: 2, min: 1, help: height and width}
  gammas: {default: [0.9, 0.99], min: 0, max: 1, help: discounts}
  limits: {default: [-60, 60], length: 2}
  mults: {default: [2, 3], min: 1, help: stages}
  names: {default: [], help: any words}
  modes: {default: [a], choices: [a, b], help: what to log}
  note: {default: '# (not a comment)', help: text}
  camera: {default: -1, max: 9, help: number of the camera}
  share: {default: 0.5, min: 0, max: 1, help: a part}
  saving: {every: {default: 1e4, min: 0, time: true, help: frames between files}}
  actor:
    help: the policy
    layers: {default: 3, help: hidden layers}
    norm:
      help: normalization
      scale: {default: 1.0}
      eps: {default: 1e-3, help: floor}
  encoder: {help: the senses, keys: {default: .*, help: regular expression}}

vision:  # learns from images
  encoder: {keys: image}
  actor: {layers: 5}
  lr: 1

debug:  # tiny
  steps: 100
  actor.layers: 1

broad: {.*\\.layers: 9, eps: 1e-3}  # everything
"""
OPEN = "  env: {open: true, help: keyword arguments of the environment, seed: {default: 0, help: its seed}}\n"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "configs.yaml"
    file.write_text(YAML)
    return file


@pytest.fixture
def load(path):
    return lambda words="": load_config(words if isinstance(words, list) else words.split(), path)


def error(function, *args, **kwargs):
    """Return the message of the UserError that the call must raise; it must be one line."""
    with pytest.raises(tools.UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_values_of_the_defaults_are_typed(load):
    config = load()
    assert config.steps == 1000000 and type(config.steps) is int
    assert config.lr == 0.00004 and type(config.lr) is float
    assert config.eps == 1e-20 and config.ratio == 512.0 and type(config.ratio) is float
    assert config.logdir is None and config.compile is True and config.camera == -1
    assert config.size == (64, 64) and config.names == () and config.note == "# (not a comment)"
    assert config.explicit == frozenset()


def test_nested_access(load):
    config = load()
    assert config.actor.layers == config["actor.layers"] == config.actor["layers"] == 3
    assert config.actor.norm.eps == config["actor.norm.eps"] == 0.001
    assert config.encoder.keys == ".*"
    with pytest.raises(AttributeError, match="layerz"):
        _ = config.actor.layerz
    with pytest.raises(KeyError):
        config["actor.layerz"]


def test_config_is_immutable(load):
    config = load()
    for change in (lambda: setattr(config, "steps", 1), lambda: setattr(config.actor, "layers", 1)):
        with pytest.raises(AttributeError, match="replace"):
            change()
    with pytest.raises(AttributeError):
        del config.steps
    assert config.steps == 1000000 and config.actor.layers == 3
    assert isinstance(config.size, tuple)


# Merging


def test_presets_are_merged_in_the_order_given(load):
    both = load("--configs vision debug")
    assert (both.encoder.keys, both.actor.layers, both.steps, both.lr) == ("image", 1, 100, 1.0)
    assert type(both.lr) is float
    assert load("--configs debug vision").actor.layers == 5
    assert load("--configs debug,vision") == load("--configs=debug,vision") == load("--configs debug vision")
    assert both.explicit == frozenset()


def test_files_lie_over_presets_and_flags_over_files(load, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.json"
    first.write_text("steps: 200\nactor:\n  layers: 7\nenvs: 2\n")
    second.write_text('{\n\t"actor.layers": 8,\n\t"compile": false, "lr": 1E-4, "batch_size": 1e2}')
    config = load(f"--steps 300 --config {first} {second} --configs debug --actor.norm.scale 2")
    assert (config.steps, config.envs, config.actor.layers, config.compile) == (300, 2, 8, False)
    assert (config.lr, config.batch_size, config.actor.norm.scale) == (0.0001, 100, 2.0)
    given = {"steps", "actor.layers", "envs", "compile", "lr", "batch_size", "actor.norm.scale"}
    assert config.explicit == given
    assert config.actor.explicit == {"layers", "norm.scale"}
    assert load(f"--config {second} {first}").actor.layers == 7


@pytest.mark.parametrize(
    "words, key, value",
    [
        ("--steps 1e6", "steps", 1000000),
        ("--steps 2000000.0", "steps", 2000000),
        ("--envs 9007199254740993", "envs", 2**53 + 1),
        ("--envs=4", "envs", 4),
        ("--camera -2", "camera", -2),
        ("--lr 1", "lr", 1.0),
        ("--lr -1e-4", "lr", -0.0001),
        ("--compile FALSE", "compile", False),
        ("--compile=True", "compile", True),
        ("--task 123", "task", "123"),
        ("--task null", "task", "null"),
        ("--task=", "task", ""),
        ("--task=--odd=1", "task", "--odd=1"),
        ("--encoder.keys $^", "encoder.keys", "$^"),
        ("--encoder.keys -.*", "encoder.keys", "-.*"),
        ("--logdir None", "logdir", None),
        ("--logdir ./run", "logdir", "./run"),
        ("--size 84 96", "size", (84, 96)),
        ("--size 84,96", "size", (84, 96)),
        ("--gammas 1 0.5 0", "gammas", (1.0, 0.5, 0.0)),
        ("--limits -1 1", "limits", (-1, 1)),
        ("--share 0", "share", 0.0),
        ("--saving.every 90s", "saving.every", "90s"),
        ("--saving.every=10m", "saving.every", "10m"),
        ("--saving.every 1.5h", "saving.every", "1.5h"),
        ("--saving.every 1e3", "saving.every", 1000),
        ("--names a b,c", "names", ("a", "b", "c")),
        ("--names=", "names", ()),
        ("--modes b a", "modes", ("b", "a")),
        ("--device cuda", "device", "cuda"),
        ("--device cuda:13", "device", "cuda:13"),
        ("--precision 16", "precision", 16),
        ("--steps 5 --steps 6", "steps", 6),
    ],
)
def test_flags(load, words, key, value):
    config = load(words)
    assert config[key] == value and type(config[key]) is type(value)
    assert config.explicit == {key}


# Mistakes


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--envs 2.5", ["--envs", "whole number", "2.5"]),
        ("--envs two", ["--envs", "whole number", "'two'"]),
        ("--envs true", ["--envs", "whole number"]),
        ("--envs inf", ["--envs", "whole number"]),
        ("--lr inf", ["--lr: expected a finite number, got inf"]),
        ("--lr nan", ["--lr: expected a finite number, got nan"]),
        ("--steps null", ["--steps", "whole number"]),
        ("--steps 1.5", ["--steps", "whole number"]),
        ("--lr fast", ["--lr", "a number", "'fast'"]),
        ("--compile 1", ["--compile", "true or false", "'1'"]),
        ("--compile yes", ["--compile", "true or false"]),
        ("--size 64 64.5", ["--size", "whole number", "64.5"]),
        ("--precision 17", ["--precision", "16, 32", "17"]),
        ("--device gpu", ["--device", "auto, cpu, cuda, cuda:N", "'gpu'"]),
        ("--device cuda:x", ["--device", "cuda:N"]),
        ("--device cuda:1x", ["--device", "cuda:N"]),
        ("--device cuda:", ["--device", "cuda:N"]),
        ("--modes a c", ["--modes", "a, b", "'c'"]),
        ("--envs 0", ["--envs: expected at least 1, got 0"]),
        ("--camera 10", ["--camera: expected at most 9, got 10"]),
        ("--share 1.5", ["--share: expected 0 to 1, got 1.5"]),
        ("--share -1", ["--share: expected 0 to 1, got -1.0"]),
        ("--gammas 1 -0.5", ["--gammas: expected 0 to 1, got -0.5"]),
        ("--size 84 0", ["--size: expected at least 1, got 0"]),
        ("--size=84,96,3", ["--size: expected 2 values, got [84, 96, 3]"]),
        ("--limits 1", ["--limits: expected 2 values, got [1]"]),
        ("--mults=", ["--mults: expected at least one number"]),
        ("--saving.every ten", ["--saving.every: expected a whole number or a time such as 10m, got 'ten'"]),
        ("--saving.every 10d", ["a time such as 10m, got '10d'"]),
        ("--saving.every -10m", ["a time such as 10m, got '-10m'"]),
        ("--saving.every 10m30s", ["a time such as 10m, got '10m30s'"]),
        ("--saving.every 1.5", ["a time such as 10m, got 1.5"]),
        ("--saving.every -1", ["--saving.every: expected at least 0, got -1"]),
        ("--batch_size 10m", ["--batch_size: expected a whole number, got '10m'"]),
        ("--batch_sise 3", ["--batch_sise: unknown key, did you mean --batch_size?"]),
        ("--batch-size 3", ["--batch-size: unknown key, did you mean --batch_size?"]),
        ("--actor.layer 3", ["--actor.layer: unknown key, did you mean --actor.layers?"]),
        ("--confgs debug", ["did you mean --configs?"]),
        ("--actor 3", ["--actor:", "--actor.layers"]),
        ("--qwxz 3", ["--qwxz: unknown key"]),
        ("--steps", ["--steps: missing value"]),
        ("--steps --envs 3", ["--steps: missing value"]),
        ("--size --envs 3", ["--size: missing value"]),
        ("--configs", ["--configs: missing value"]),
        ("--configs debgu", ["unknown preset", "did you mean debug?"]),
        ("--configs defaults", ["unknown preset"]),
        ("debug", ["debug: stray argument"]),
        ("--steps 100 200", ["200: stray argument"]),
        ("--steps=100 200", ["200: stray argument"]),
        ("-steps 100", ["-steps: stray argument"]),
    ],
)
def test_bad_flags_are_refused(load, words, parts):
    message = error(load, words)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "preset, parts",
    [
        ("step: 1e8", ["odd: step: unknown key, did you mean steps?"]),
        ("value: {layers: 5}", ["odd: value.layers: unknown key"]),
        ("actor: {layrs: 5}", ["odd: actor.layrs: unknown key, did you mean actor.layers?"]),
        ("actor: 5", ["odd: actor: unknown key, did you mean actor.layers?"]),
        ("steps: {more: 5}", ["odd: steps.more: unknown key"]),
        ("steps: '5'", ["odd: steps: expected a whole number, got '5'"]),
        ("steps: null", ["odd: steps: expected a whole number, got None"]),
        ("compile: 1", ["odd: compile: expected true or false, got 1"]),
        ("compile: yes", ["odd: compile: expected true or false"]),
        ("task: 5", ["odd: task: expected text, got 5"]),
        ("task: true", ["odd: task: expected text"]),
        ("logdir: 5", ["odd: logdir: expected text"]),
        ("size: 64", ["odd: size: expected a list, got 64"]),
        ("names: [a, 1]", ["odd: names: expected text, got 1"]),
        ("precision: 17", ["odd: precision: expected one of 16, 32, got 17"]),
        ("{actor.layers: 1, actor: {layers: 2}}", ["actor.layers: given twice"]),
        (r"{.*\.layer: 3}", [r"odd: .*\.layer: matches no key"]),
        ("{.*ayers: two}", ["odd: actor.layers: expected a whole number, got 'two'"]),
        ("{'*.layers': 2}", ["odd: *.layers: neither a key nor a pattern: "]),
        ("{actor: {'.*erz': 3}}", ["odd: actor..*erz: matches no key"]),
        ("include: debgu", ["odd: include: debgu: unknown preset, did you mean debug?"]),
        ("include: [debug, defaults]", ["odd: include: defaults: unknown preset"]),
        ("include: {debug: 1}", ["odd: include: "]),
        ("include: [[debug]]", ["odd: include: "]),
        ("include: odd", ["odd: include: goes round in a circle (odd > odd)"]),
        ("steps: [1", ["line "]),
        ("just text", ["odd: expected a mapping"]),
    ],
)
def test_a_wrong_preset_is_refused_where_it_is_asked_for_or_all_are_checked(path, preset, parts):
    path.write_text(f"{YAML}\nodd:  # wrong\n  {preset}\n")
    message = error(load_config, ["--configs", "odd"], path)
    assert str(path) in message and all(part in message for part in parts), message
    assert error(load_presets, path) == message
    assert load_config(["--configs", "debug"], path).steps == 100  # others are not read
    assert "odd " in help_text(path)


def test_a_pattern_sets_every_key_that_it_matches_whole(path):
    more = r"""
wide: {.*\.scale: 2.0, (nothing|encoder)\..*s: a}
all: {actor: {norm: {.*: 2}}}
named: {actor.layers: 1, .*\.layers: 2}
twice: {.*rs: 2, actor\.l.*: 3}
"""
    path.write_text(YAML + more)
    presets = load_presets(path)
    assert presets["wide"] == {"actor.norm.scale": 2.0, "encoder.keys": "a"}
    assert presets["all"] == {"actor.norm.scale": 2.0, "actor.norm.eps": 2.0}
    assert presets["named"] == {"actor.layers": 1}  # a name has priority over patterns, whatever the order
    assert presets["twice"] == {"actor.layers": 3}
    assert presets["broad"] == {"actor.layers": 9, "eps": 0.001}


def test_patterns_are_for_presets_only(load, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(r"{.*\.layers: 3}")
    assert r".*\.layers: unknown key" in error(load, f"--config {file}")
    assert "stray argument" in error(load, r"--.*\.layers 3")
    assert r"unknown key" in error(load().replace, **{r".*\.layers": 3})


def test_a_preset_lies_over_those_that_it_includes(path):
    more = """
first: {include: debug, envs: 2, ratio: 1}
second: {include: [vision, first], ratio: 2}
bare:
  include: [second]  # nothing else
round: {include: about}
about: {include: [debug, round]}
"""
    path.write_text(YAML + more)
    config = load_config(["--configs", "second"], path)
    assert (config.encoder.keys, config.actor.layers, config.steps) == ("image", 1, 100)
    assert (config.envs, config.ratio, config.lr) == (2, 2.0, 1.0)
    assert load_config(["--configs", "bare"], path) == config and config.explicit == frozenset()
    circle = "about: include: goes round in a circle (about > round > about)"
    assert circle in error(load_config, ["--configs", "about"], path)
    assert error(load_config, ["--include", "debug"], path).startswith("--include: unknown key")


def test_repeated_presets_and_files_all_count(load, tmp_path):
    for name, text in {"a,b.yaml": "envs: 3\nactor: {}", "c.yaml": "batch_size: 4"}.items():
        (tmp_path / name).write_text(text)
    words = ["--configs", "debug", "--config", str(tmp_path / "a,b.yaml"), "--configs", "vision"]
    config = load([*words, "--config", str(tmp_path / "c.yaml")])
    assert (config.steps, config.envs, config.batch_size, config.actor.layers, config.lr) == (100, 3, 4, 5, 1.0)
    assert error(load, "--config=") == "--config: missing value"


def test_bad_files_are_refused(load, tmp_path):
    file = tmp_path / "run.yaml"
    assert "run.yaml: No such file" in error(load, f"--config {file}")
    for content, part in [
        ("steps: 1\nsteps: 2\n", 'line 2: found duplicate key "steps"'),
        ('{"steps": 1, "steps": 2}', "duplicate key"),
        ("steps: [1\n", "run.yaml: line"),
        ("steps: \x00", "run.yaml: "),
        ("- steps\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("step: 1e8\n", "run.yaml: step: unknown key, did you mean steps?"),
        ("envs: 2.5\n", "run.yaml: envs: expected a whole number, got 2.5"),
        ("precision: 17\n", "run.yaml: precision: expected one of 16, 32"),
        ("actr: {}\n", "run.yaml: actr: unknown key"),
        ("actor: &a {b: *a}\n", "run.yaml: its aliases unfold to more than 10,000 values"),
    ]:
        file.write_text(content)
        assert part in error(load, f"--config {file}"), content
    file.write_bytes(b"task: \xff\xfe")
    assert "run.yaml: " in error(load, f"--config {file}")


@pytest.mark.parametrize(
    "content, part",
    [
        ("", "defaults"),
        ("debug: {steps: 1}", "defaults"),
        ("defaults:", "defaults: expected a mapping"),
        ("defaults: {steps: {default: 1}, steps: {default: 2}}", "duplicate key"),
        ("defaults: {}\nslow: {}\nfast: {}\nslow: {}\n", 'line 4: found duplicate key "slow"'),
        ("# a\n\ndefaults:\n  steps: {default: 1\n  task: {default: a}\n", "line 5: "),
        ("defaults: {}\nslow\n", "line 2: expected a name and a colon"),
        ("- defaults\n", "line 1: expected a name and a colon"),
        ("defaults:\n  steps: 1\n", "defaults: steps: expected a mapping, got 1"),
        ("defaults:\n  a: {b: 1}\n", "defaults: a.b: expected a mapping, got 1"),
        ("defaults:\n  a: {b: {default: 1}, help: 1}\n", "defaults: a.help: expected text, got 1"),
        ("defaults:\n  a: {b: {default: 1}, open: 1}\n", "defaults: a.open: expected true or false, got 1"),
        ("defaults:\n  a: {b: {default: 1}}\n  a.b: {default: 1}\n", "defaults: a.b: given twice"),
        ("defaults:\n  steps: {default: 1, mn: 1}\n", "defaults: steps: mn: unknown attribute"),
        ("defaults:\n  steps: {default: 1, help: one, or two}\n", "text with a comma needs quotes"),
        ("defaults:\n  steps: {default: 1, min: a}\n", "defaults: steps: min: 'a' does not go with the default 1"),
        ("defaults:\n  task: {default: a, min: 1}\n", "defaults: task: min: 1 does not go with the default 'a'"),
        ("defaults:\n  steps: {default: 1, length: 2}\n", "defaults: steps: length: 2 does not go with"),
        ("defaults:\n  task: {default: a, time: true}\n", "defaults: task: time: True does not go with"),
        ("defaults:\n  fast: {default: true, choices: [true]}\n", "defaults: fast: choices: [True] does not go with"),
        ("defaults:\n  steps: {default: 1, help: 2}\n", "defaults: steps: help: 2 does not go with"),
        ("defaults:\n  steps: {default: 0, min: 1}\n", "defaults: steps: expected at least 1, got 0"),
        ("defaults:\n  device: {default: gpu, choices: [cpu]}\n", "defaults: device: expected one of cpu, got 'gpu'"),
        ("defaults:\n  size: {default: [1, 2.5]}\n", "defaults: size: expected a whole number"),
        ("defaults:\n  when: {default: 2024-01-01}\n", "defaults: when: expected a single value or a list"),
        ("defaults:\n  when: {default: {}}\n", "defaults: when: expected a single value or a list"),
        ("defaults:\n  replay:\n    save: {default: 1}\n", "the name save is taken"),
        ("defaults:\n  config: {default: a}\n", "the name config is taken"),
        ("defaults:\n  include: {default: a}\n", "the name include is taken"),
    ],
)
def test_bad_defaults_are_refused(path, content, part):
    path.write_text(content)
    message = error(load_config, [], path)
    assert message.startswith(f"{path}: ") and part in message, message


@pytest.mark.parametrize("key", ["batch_size", "actor.layers", "compile", "encoder.keys", "gammas", "precision"])
def test_the_nearest_key_is_named(load, key):
    for wrong in (key[:-1], key + "x", key[1:], key.replace("e", "a").replace("mm", "m")):
        if wrong != key:
            assert error(load, f"--{wrong} 1") == f"--{wrong}: unknown key, did you mean --{key}?"


# Config


def test_replace_is_checked_and_leaves_the_original(load):
    config = load("--envs 3")
    other = config.replace(**{"actor.layers": 9, "steps": 1e3, "size": [1, 2]})
    assert (other.actor.layers, other.steps, other.size, other.envs) == (9, 1000, (1, 2), 3)
    assert config.actor.layers == 3 and other.explicit == {"envs"} and other != config
    assert config.replace(actor={"layers": 9}) == config.replace(**{"actor.layers": 9})
    assert config.actor.replace(layers=9).layers == 9
    assert "did you mean actor.layers?" in error(config.replace, **{"actor.layer": 1})
    assert "layers: expected a whole number" in error(config.actor.replace, layers=2.5)


def test_to_dict_is_plain_and_equal_by_value(load):
    config = load("--size 1 2")
    tree = config.to_dict()
    assert json.loads(json.dumps(tree)) == tree
    assert tree["size"] == [1, 2] and tree["actor"] == {"layers": 3, "norm": {"scale": 1.0, "eps": 0.001}}
    tree["actor"]["layers"] = 4
    assert config.actor.layers == 3
    assert config == load("--size 1,2") and config != load() and config != config.to_dict()


def test_save_reads_back_equal(load, tmp_path):
    words = ["--task", "1e6", "--encoder.keys", "$^|'\"#: x " + "y " * 99, "--lr", "1e-20", "--ratio", "1e30"]
    words += ["--names", "null", "true", "1", "--modes=", "--note", "ä\n", "--configs", "vision"]
    config = load(words)
    config.save(tmp_path / "config.yaml")
    again = load(f"--config {tmp_path / 'config.yaml'}")
    assert again == config and again.task == "1e6" and again.lr == 1e-20 and again.names == ("null", "true", "1")
    assert again.logdir is None and again.modes == () and again.actor.layers == 5
    assert "actor.norm.eps" in again.explicit


def test_save_is_atomic(load, tmp_path, monkeypatch):
    target = tmp_path / "config.yaml"
    load().save(target)
    before = target.read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        load("--envs 5").save(target)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "configs.yaml"]


def test_config_pickles(load):
    config = load("--actor.layers 9 --configs vision")
    again = pickle.loads(pickle.dumps(config))
    assert isinstance(again, Config) and again == config and again.actor.layers == 9
    assert again.explicit == {"actor.layers"} and again.replace(envs=2).envs == 2


# Open sections


@pytest.fixture
def load_open(path):
    path.write_text(YAML.replace("\nvision:", f"{OPEN}\nvision:") + "\nmaze: {env: {walls: [a, 1], deep: {x: null}}}\n")
    return lambda words="": load_config(words if isinstance(words, list) else words.split(), path)


def test_an_open_section_may_be_empty(path):
    path.write_text(YAML.replace("\nvision:", "  env: {open: true}\n\nvision:"))
    config = load_config([], path)
    assert isinstance(config.env, Config) and config.env.to_dict() == config.to_dict()["env"] == {}
    assert load_config(["--env.a", "1"], path).env.a == 1


@pytest.mark.parametrize(
    "words, value",
    [
        ("--env.x 3", 3),
        ("--env.x -3", -3),
        ("--env.x 0x1F", 31),
        ("--env.x 1e6", 1000000.0),
        ("--env.x -.5", -0.5),
        ("--env.x true", True),
        ("--env.x False", False),
        ("--env.x yes", "yes"),
        ("--env.x null", None),
        ("--env.x ~", None),
        ("--env.x none", "none"),
        ("--env.x=", ""),
        ("--env.x word", "word"),
        ("--env.x '1'", "1"),
        ("--env.x ''", ""),
        ("--env.x a,1", ("a", 1)),
        ("--env.x a 1 true", ("a", 1, True)),
        ("--env.x a,", ("a",)),
        ("--env.x=,", ()),
        ("--env.x []", ()),
        ("--env.x [1,[a,2.5]]", (1, ("a", 2.5))),
        ("--env.x [1,2] [3,4]", ((1, 2), (3, 4))),
        ("--env.x [1", "[1"),
        ("--env.x {a:1}", "{a:1}"),
        ("--env.x a:b#c", "a:b#c"),
        ("--env.x *x", "*x"),
        ("--env.x !!python/name:os", "!!python/name:os"),
        ("--env.x 2024-01-01", "2024-01-01"),
        ("--env.x .*", ".*"),
    ],
)
def test_flags_of_an_open_section_are_read_as_yaml(load_open, words, value):
    config = load_open(words)
    assert config.env.x == config["env.x"] == value and type(config.env.x) is type(value)
    assert config.explicit == {"env.x"} and config.env.explicit == {"x"} and config.env.seed == 0


def test_presets_and_files_reach_into_open_sections_and_the_last_wins(load_open, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("env:\n  deep:\n    y: [1, [2, x]]\n  big: 1e30\n  seed: 7\n")
    config = load_open(f"--configs maze --config {file} --env.walls 3")
    assert config.env.to_dict() == {"seed": 7, "walls": 3, "deep": {"x": None, "y": [1, [2, "x"]]}, "big": 1e30}
    assert config.env.deep.y == (1, (2, "x")) and config.env.explicit == {"seed", "walls", "deep.y", "big"}
    assert load_open("--configs maze --env.deep 3").env.deep == 3
    assert load_open("--configs maze --env.walls.x 3").env.walls.to_dict() == {"x": 3}
    assert load_open("--env.a.b 1 --env.a 2 --env.a.b 3").env.a.b == 3
    other = config.replace(**{"env.new": 1}, env={"walls": [1]})
    assert other.env.new == 1 and other.env.walls == (1,) and config.env.walls == 3
    assert config.env.replace(more=1).more == 1
    assert pickle.loads(pickle.dumps(other)) == other


def test_open_sections_are_saved_and_read_back_equal(load_open, tmp_path):
    words = ["--env.a", "yes", "--env.b", "'null'", "--env.c", "'1e6'", "--env.d", "1e30", "--env.e", "1e-20"]
    words += ["--env.f", "2024-01-01", "--env.g", "'0x1F'", "--env.h", "[[]]", "--env.i.j", "null", "--env.k", "1e6"]
    words += ["--env.l=", "--env.m", "'1_0' ~ true", "--env.n", "'1_0'", "null", "true", "--env.o", "'true'"]
    config = load_open(words)
    config.save(tmp_path / "config.yaml")
    again = load_open(f"--config {tmp_path / 'config.yaml'}")
    assert again == config and repr(again.to_dict()) == repr(config.to_dict())
    load_open().save(tmp_path / "config.yaml")
    assert load_open(f"--config {tmp_path / 'config.yaml'}") == load_open()


@pytest.mark.parametrize(
    "words, part",
    [
        ("--env 3", "--env: unknown key, did you mean --task?"),
        ("--env. 3", "--env.: unknown key"),
        ("--env..a 3", "--env..a: unknown key"),
        ("--env.a. 3", "--env.a.: unknown key"),
        ("--env.seed x", "--env.seed: expected a whole number, got 'x'"),
        ("--env.seed.more 1", "--env.seed.more: unknown key"),
        ("--env.save 1", "--env.save: the name save is taken"),
        ("--env.a._b 1", "--env.a._b: the name _b is taken"),
        ("--env.explicit 1", "the name explicit is taken"),
        ("--env.a", "--env.a: missing value"),
        ("--env.a .inf", "--env.a: expected a finite number, got inf"),
        ("--env.a [{b:1}]", "--env.a: expected"),
        ("--envy.a 1", "--envy.a: unknown key"),
    ],
)
def test_bad_flags_of_open_sections_are_refused(load_open, words, part):
    assert part in error(load_open, [word.replace("b:1", "b: 1") for word in words.split()])


def test_bad_values_of_open_sections_are_refused(load_open, tmp_path):
    file = tmp_path / "run.yaml"
    for content, part in [
        ("env: 3\n", "run.yaml: env: unknown key, did you mean task?"),
        ("env: {a: {}}\n", "run.yaml: env.a: expected a single value or a list, got {}"),
        ("env: {a: [{b: 1}]}\n", "run.yaml: env.a: expected a single value or a list, got {'b': 1}"),
        ("env: {a: 2024-01-01}\n", "run.yaml: env.a: expected a single value or a list"),
        ("env: {a: &a [*a]}\n", "run.yaml: its aliases unfold to more than 10,000 values"),
        ("{env: {a: 1}, env.a.b: 2}\n", "run.yaml: env.a.b: given twice"),
        ("{env: {a.b: 1, a: {b: 2}}}\n", "run.yaml: env.a.b: given twice"),
    ]:
        file.write_text(content)
        assert part in error(load_open, f"--config {file}"), content


def test_help_lists_open_sections(load_open, path):
    lines = help_text(path).split("\n") if load_open() else []
    assert any(re.fullmatch(r"  --env\.NAME \.\.\. +keyword arguments of the environment", line) for line in lines)
    assert any(re.fullmatch(r"  --env\.seed 0 +its seed", line) for line in lines)


# Older versions


def old_run(**changes):
    """Return the retired keys that a run of an older version wrote to its config.yaml."""
    keys = {"behavior": "actor_critic", **RETIRED} | changes
    tree = {}
    for name, value in keys.items():
        section, dot, key = name.partition(".")
        if dot:
            tree.setdefault(section, {})[key] = value
        else:
            tree[name] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    "weight, baseline, slow_target, behavior",
    [
        ("predicted", True, False, "actor_critic"),
        ("shifted", False, True, "dreamerv2"),
        ("shifted", False, False, "dreamerv1"),
        ("true_start", True, False, "dreamerv3_2023"),
    ],
)
def test_the_switches_of_older_versions_become_a_behavior(tmp_path, weight, baseline, slow_target, behavior):
    switches = {"imag_weight": weight, "actor.baseline": baseline, "critic.slow_target": slow_target}
    file = tmp_path / "config.yaml"
    file.write_text(old_run(**switches))
    config = load_config(["--config", str(file)], CONFIGS)
    assert config.behavior == behavior and config.explicit == {"behavior"}
    preset = load_config(["--configs", behavior], CONFIGS) if behavior != "actor_critic" else load_config([], CONFIGS)
    assert preset.behavior == behavior
    file.write_text(old_run(**switches, behavior="cem"))
    if behavior != "actor_critic":
        assert "imag_weight: this key is retired" in error(load_config, ["--config", str(file)], CONFIGS)
    else:
        assert load_config(["--config", str(file)], CONFIGS).behavior == "cem"


@pytest.mark.parametrize("name", RETIRED)
def test_a_retired_key_is_ignored_at_its_old_default_and_else_refused(tmp_path, name):
    file, old = tmp_path / "config.yaml", str(RETIRED[name]).lower()
    file.write_text(old_run())
    assert load_config(["--config", str(file), f"--{name}", old], CONFIGS) == load_config([], CONFIGS)
    assert f"--{name}" not in help_text(CONFIGS)
    for value in ("odd", [1], None, not RETIRED[name] if isinstance(RETIRED[name], bool) else 0.5):
        file.write_text(old_run(**{name: value}))
        message = error(load_config, ["--config", str(file)], CONFIGS)
        assert message.startswith(f"{file}: {name}: this key is retired") and f"old default, {old}," in message
        assert f"--{name}: this key is retired" in error(load_config, [f"--{name}", f"{value}"], CONFIGS)
    assert f"--{name}: missing value" == error(load_config, [f"--{name}"], CONFIGS)
    with pytest.raises(tools.UserError, match="unknown key"):
        load_config([], CONFIGS).replace(**{name: RETIRED[name]})


# The file itself


def test_every_preset_of_configs_yaml_is_right():
    presets = load_presets(CONFIGS)
    assert len(presets) >= 30
    for name in presets:
        load_config(["--configs", name], CONFIGS)
    assert yaml12().load(CONFIGS.read_text()).keys() - presets.keys() == {"defaults"}  # as YAML 1.2 parsers read it


def test_every_key_and_preset_of_configs_yaml_has_help_and_a_screen_is_wide_enough_for_it():
    lines = help_text(CONFIGS).split("\n")
    assert all(len(line) <= 100 for line in lines)
    rows = lines[lines.index("Presets, merged over the defaults in the order given:") + 1 :]
    for line in rows:
        assert not line.strip() or line.startswith("Keys") or re.match(r"  \S.*\S  +\S|  --\w+   +\S| \w| {9}", line), (
            line
        )
    assert all(len(line) <= 120 for line in CONFIGS.read_text().split("\n"))


@pytest.mark.parametrize(
    "preset, units, depth, deter, hidden, classes",
    [
        ("size1m", 64, 4, 512, 64, 4),
        ("size12m", 256, 16, 2048, 256, 16),
        ("size25m", 384, 24, 3072, 384, 24),
        ("size50m", 512, 32, 4096, 512, 32),
        ("size100m", 768, 48, 6144, 768, 48),
        ("size200m", 1024, 64, 8192, 1024, 64),
        ("size400m", 1536, 96, 12288, 1536, 96),
    ],
)
def test_sizes_set_these_keys_and_no_others(preset, units, depth, deter, hidden, classes):
    parts = ("encoder", "decoder", "text", "reward_head", "cont_head", "actor", "critic", "hierarchy")
    expected = dict.fromkeys((f"{part}.units" for part in parts), units)
    expected |= dict.fromkeys(("encoder.depth", "decoder.depth", "audio.depth"), depth)
    expected |= {"rssm.deter": deter, "rssm.hidden": hidden, "rssm.classes": classes}
    presets = load_presets(CONFIGS)
    assert presets[preset] == expected
    assert preset != "size1m" or expected.items() <= presets["dmc_proprio"].items()
    assert preset != "size12m" or load_config(["--configs", preset], CONFIGS) == load_config([], CONFIGS)


@pytest.mark.parametrize(
    "preset, layers, units, depth, deter",
    [
        ("dreamerv3_2023_m", 3, 640, 48, 1024),
        ("dreamerv3_2023_l", 4, 768, 64, 2048),
        ("dreamerv3_2023_xl", 5, 1024, 96, 4096),
    ],
)
def test_sizes_of_the_2023_form_leave_vectors_as_they_are(preset, layers, units, depth, deter):
    parts = ("reward_head", "cont_head", "actor", "critic")
    expected = {f"{part}.{key}": value for part in parts for key, value in {"layers": layers, "units": units}.items()}
    expected |= {
        "encoder.depth": depth,
        "decoder.depth": depth,
        "audio.depth": depth,
        "rssm.deter": deter,
        "rssm.hidden": units,
    }
    expected |= {"disag_layers": layers, "disag_units": units}
    assert load_presets(CONFIGS)[preset] == expected
    for names in (["dreamerv3_2023"], ["dreamerv3_2023", preset]):
        config = load_config(["--configs", *names], CONFIGS)
        assert {(part.layers, part.units) for part in (config.encoder, config.decoder)} == {(5, 1024)}


@pytest.mark.parametrize("suite", ["atari", "procgen", "dmc_vision", "crafter"])
def test_the_2023_form_has_small_images_in_color_and_a_replay_and_evaluation_of_its_own(suite):
    config = load_config(["--configs", suite, "dreamerv3_2023"], CONFIGS)
    assert (config.size, config.atari.gray, config.dataset_size, config.eval_mode) == ((64, 64), False, 1e6, "sample")


def test_the_keys_of_this_version():
    config = load_config([], CONFIGS)
    assert (config.agent, config.behavior) == ("dreamer", "actor_critic")
    assert (config.eval_episode_num, config.save_every) == (10, 10000)
    for words in ("--eval_episode_num 0", "--save_every 10m", "--agent random", "--device cuda:3", "--precision 32"):
        key, value = words[2:].split()
        assert str(load_config(words.split(), CONFIGS)[key]) == value
    for preset in ("dreamerv1", "dreamerv2", "dreamerv3_2023"):
        assert load_config(["--configs", preset], CONFIGS).behavior == preset
    assert "at least 0" in error(load_config, ["--eval_episode_num", "-1"], CONFIGS)
    assert "or a time such as 10m" in error(load_config, ["--save_every", "10d"], CONFIGS)


def test_reading_the_file_takes_little_more_than_parsing_its_defaults():
    code = """
import sys, time
from training.config import CONFIGS, UserError, load_config
from training.settings import yaml12
text = CONFIGS.read_text()
defaults = text[text.index("defaults:") : text.index("size1m:")]
start = time.process_time()
yaml12().load(defaults)
parsed = time.process_time()
try:
    load_config(["--batch_sise", "3"], CONFIGS)
except UserError:
    print((time.process_time() - parsed) / (parsed - start))
"""
    run = [sys.executable, "-c", code]
    ratios = [float(subprocess.check_output(run, cwd=CONFIGS.parent, text=True)) for _ in range(3)]
    assert min(ratios) < 1.5, ratios


# Help


def test_help_lists_presets_and_keys_aligned(path):
    lines = help_text(path).split("\n")
    assert lines[0].startswith("usage: python3 dreamer.py")
    assert any(line.split() == ["vision", "learns", "from", "images"] for line in lines)
    columns = set()
    for start, text in [
        ("  debug ", "tiny"),
        ("  --steps 1000000 ", "environment frames of the run"),
        ("  broad ", "everything"),
        ("  --envs 1 ", "environments (at least 1)"),
        ("  --share 0.5 ", "a part (0 to 1)"),
        ("  --camera -1 ", "number of the camera (at most 9)"),
        ("  --device auto ", "where networks live (auto|cpu|cuda|cuda:N)"),
        ("  --size 64 64 ", "height and width (2 values, at least 1)"),
        ("  --limits -60 60 ", "(2 values)"),
        ("  --modes a ", "what to log (a|b)"),
        ("  --saving.every 10000 ", "frames between files (at least 0, or a time such as 10m)"),
        ("  --logdir None ", "where to write; null for nowhere"),
        ("  --note # (not a comment) ", "text"),
        ("  --actor ... ", "the policy"),
        ("  --actor.layers 3 ", "hidden layers"),
        ("  --actor.norm ... ", "normalization"),
        ("  --encoder.keys .* ", "regular expression"),
    ]:
        (line,) = (line for line in lines if line.startswith(start))
        assert line.endswith("  " + text)
        columns.add(len(line) - len(text))
    assert len(columns) == 1
    assert sum(line.startswith("  --") for line in lines) == 25 + 4 + 6  # keys and sections, and what stands above


@pytest.mark.parametrize("words", ["--help", "-h", "--configs debug --help", "--nonsense -h"])
def test_help_flag_prints_and_exits_with_0(load, path, capsys, words):
    with pytest.raises(SystemExit) as exit:
        load(words)
    assert exit.value.code == 0
    assert capsys.readouterr().out == help_text(path) + "\n"


def test_no_key_can_take_the_name_of_a_method():
    assert {name for name in dir(Config) if name[0] != "_"} | {"explicit"} == set(TAKEN)
