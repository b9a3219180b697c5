import json
import os
import pickle

import pytest

import tools
from training.config import Config, help_text, load_config

YAML = """\
defaults:  # what a run does unless told otherwise
  # A full-line comment is no help line
  task: dummy_multi  # suite and task
  logdir: null  # where to write; null for nowhere
  steps: 1e6  # environment frames of the run
  lr: 4e-5  # learning rate
  eps: 1e-20  # floor
  ratio: 512.0  # replayed steps per agent step
  envs: 1  # environments
  batch_size: 16  # sequences in a batch
  compile: true  # compile the update
  device: auto  # where networks live (auto|cpu|cuda|cuda:N)
  precision: 32  # bits of a float (16|32)
  size: [64, 64]  # height and width
  gammas: [0.9, 0.99]  # discounts
  names: []  # any words
  modes: [a]  # what to log (a|b)
  note: '# (not a comment)'  # text
  camera: -1  # number of the camera
  actor:  # the policy
    layers: 3  # hidden layers
    norm: {scale: 1.0, eps: 1e-3}  # normalisation
  encoder:  # the senses
    keys: .*  # regular expression

vision:  # learns from images
  encoder: {keys: image}
  actor: {layers: 5}
  lr: 1

debug:  # tiny
  steps: 100
  actor.layers: 1
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "configs.yaml"
    file.write_text(YAML)
    return file


@pytest.fixture
def load(path):
    return lambda words="": load_config(words if isinstance(words, list) else words.split(), path)


def error(function, *args, **kwargs):
    """The message of the UserError that the call must end in; it must be one line."""
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
        ("--size=84,96,3", "size", (84, 96, 3)),
        ("--gammas 1 -0.5", "gammas", (1.0, -0.5)),
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
        ("--modes a c", ["--modes", "a, b", "'c'"]),
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
        ("just text", ["odd: expected a mapping"]),
    ],
)
def test_a_preset_nobody_asked_for_is_checked(path, preset, parts):
    path.write_text(f"{YAML}\nodd:  # wrong\n  {preset}\n")
    message = error(load_config, [], path)
    assert str(path) in message and all(part in message for part in parts), message


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
        ("actor: &a {b: *a}\n", "run.yaml: nested without an end"),
    ]:
        file.write_text(content)
        assert part in error(load, f"--config {file}"), content
    file.write_bytes(b"task: \xff\xfe")
    assert "run.yaml: " in error(load, f"--config {file}")


def test_bad_defaults_are_refused(path):
    for content, part in [
        ("", "defaults"),
        ("debug: {steps: 1}", "defaults"),
        ("defaults: {steps: 1, steps: 2}", "duplicate key"),
        ("defaults:\n  device: gpu  # place (cpu|cuda)\n", "defaults: device: expected one of cpu, cuda"),
        ("defaults:\n  size: [1, 2.5]  # mixed\n", "defaults: size: expected a whole number"),
        ("defaults:\n  when: 2024-01-01\n", "defaults: when: expected"),
        ("defaults:\n  replay:\n    save: 1\n", "the name save is taken"),
        ("defaults:\n  config: a\n", "the name config is taken"),
    ]:
        path.write_text(content)
        assert part in error(load_config, [], path), content


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


# Help


def test_help_lists_presets_and_keys_aligned(path):
    lines = help_text(path).split("\n")
    assert lines[0].startswith("usage: python3 dreamer.py")
    assert any(line.split() == ["vision", "learns", "from", "images"] for line in lines)
    columns = set()
    for start, text in [
        ("  debug ", "tiny"),
        ("  --steps 1000000 ", "environment frames of the run"),
        ("  --device auto ", "where networks live (auto|cpu|cuda|cuda:N)"),
        ("  --size 64 64 ", "height and width"),
        ("  --logdir None ", "where to write; null for nowhere"),
        ("  --note # (not a comment) ", "text"),
        ("  --actor ... ", "the policy"),
        ("  --actor.layers 3 ", "hidden layers"),
        ("  --actor.norm ... ", "normalisation"),
        ("  --encoder.keys .* ", "regular expression"),
    ]:
        (line,) = (line for line in lines if line.startswith(start))
        assert line.endswith("  " + text)
        columns.add(len(line) - len(text))
    assert len(columns) == 1
    assert sum(line.startswith("  --") for line in lines) == 21 + 3  # keys and sections


@pytest.mark.parametrize("words", ["--help", "-h", "--configs debug --help", "--nonsense -h"])
def test_help_flag_prints_and_exits_with_0(load, path, capsys, words):
    with pytest.raises(SystemExit) as exit:
        load(words)
    assert exit.value.code == 0
    assert capsys.readouterr().out == help_text(path) + "\n"
