"""Strict configuration: defaults, presets, --config files and flags are merged into one immutable Config.

Nothing is accepted in silence: every key must be among the defaults, every value must have its default's
type, and any mistake, also one in a preset that nobody asked for, is a `tools.UserError` of one line.
"""

import contextlib
import difflib
import functools
import math
import os
import pathlib
import re
from typing import NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode

from tools import UserError, atomic_write

CONFIGS = pathlib.Path(__file__).parents[1] / "configs.yaml"
USAGE = "usage: python3 dreamer.py [--configs PRESET ...] [--config FILE ...] [--KEY VALUE ...]"
yaml12 = functools.partial(YAML, typ="safe", pure=True)  # JSON is a part of it
OWN_FLAGS = ("configs", "config")
FLAG = re.compile(r"--[A-Za-z_]")  # so that values such as -1 and $^ are not taken for flags
COMMENT = re.compile(r":?\s*#+\s*(.*)")
CHOICES = re.compile(r"\(([^\s()|]+(?:\|[^\s()|]+)+)\)$")
LEAST = re.compile(r"\(>= (\d+)\)$")
RANGE = re.compile(r"\((\d+) to (\d+)\)$")
PAIR = re.compile(r"\btwo numbers\b")
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}


class Setting(NamedTuple):
    """A key of the configuration and its value.

    The default gives the type: null stands for text or null, a tuple for a list of any length with elements like
    its first (text if empty). The help line may end in the values allowed: `(auto|cpu|cuda:N)`, N any digits; in the
    least number allowed: `(>= 1)`, of which a list needs one; or in both bounds: `(0 to 1)`. It says `two numbers` of
    a list that has just two.
    `given`: the value comes from the user's flags or --config files.
    """

    default: object
    help: str
    value: object
    given: bool = False

    def check(self, value):
        """Return `value` in the type of the default; raise ValueError that says what was expected."""
        if self.default is None and str(value).lower() in ("none", "null"):
            return None
        kind = str if self.default is None else type(self.default)
        if kind is tuple and isinstance(value, (list, tuple)):
            if PAIR.search(self.help) and len(value) != 2:
                raise ValueError(f"expected two numbers, got {list(value)}")
            if LEAST.search(self.help) and not value:
                raise ValueError("expected at least one number")
            return tuple(self._element().check(item) for item in value)
        if {kind, type(value)} == {int, float} and (kind is float or value % 1 == 0):
            value = kind(value)
        if kind not in EXPECTED or type(value) is not kind:
            raise ValueError(f"expected {EXPECTED.get(kind, 'a single value or a list')}, got {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"expected a finite number, got {value!r}")
        choices = CHOICES.search(self.help)
        if choices and kind in (int, str):
            allowed = re.escape(choices[1]).replace(r"\|", "|").replace(":N", r":\d+")
            if not re.fullmatch(allowed, str(value)):
                raise ValueError(f"expected one of {choices[1].replace('|', ', ')}, got {value!r}")
        least = LEAST.search(self.help)
        if least and kind in (int, float) and not value >= int(least[1]):
            raise ValueError(f"expected at least {least[1]}, got {value!r}")
        bounds = RANGE.search(self.help)
        if bounds and kind in (int, float) and not int(bounds[1]) <= value <= int(bounds[2]):
            raise ValueError(f"expected {bounds[1]} to {bounds[2]}, got {value!r}")
        return value

    def parse(self, texts):
        """What the words of a flag mean. What cannot be read stays text, for `check` to refuse."""
        if isinstance(self.default, tuple):
            return [self._element().parse([item]) for text in texts for item in text.split(",") if item]
        if isinstance(self.default, bool):
            return {"true": True, "false": False}.get(texts[0].lower(), texts[0])
        for number in (int, float) if isinstance(self.default, (int, float)) else ():
            with contextlib.suppress(ValueError):
                return number(texts[0])
        return texts[0]

    def _element(self):
        return self._replace(default=self.default[0] if self.default else "")


class Config:
    """Immutable nested configuration: `config.actor` is a Config, `config.actor.layers` is `config["actor.layers"]`.

    Lists are tuples. `explicit` is the set of dotted keys that the user gave by flags or --config files.
    An unknown name is an AttributeError, or a KeyError in brackets.
    """

    def __init__(self, settings):
        """settings: {dotted name: Setting}."""
        children = {}
        for name, setting in settings.items():
            section, dot, _ = name.partition(".")
            if not dot:
                children[name] = setting.value
            elif section not in children:
                inside = [full for full in settings if full.startswith(f"{section}.")]
                children[section] = Config({full.partition(".")[2]: settings[full] for full in inside})
        explicit = frozenset(name for name, setting in settings.items() if setting.given)
        vars(self).update(children, explicit=explicit, _children=children, _settings=settings)

    def __setattr__(self, name, *value):
        raise AttributeError(f"a Config is immutable: use config.replace({name}=...)")

    __delattr__ = __setattr__

    def __getitem__(self, name):
        return self._settings[name].value

    def __eq__(self, other):
        return self.to_dict() == other.to_dict() if isinstance(other, Config) else NotImplemented

    def replace(self, **changes):
        """A Config with other values (by dotted keys or nested mappings), checked likewise; `explicit` stays."""
        checked = _checked(self._settings, changes, "")
        return Config(self._settings | {n: self._settings[n]._replace(value=checked[n]) for n in checked})

    def to_dict(self):
        """Nested dict of plain types, lists as lists."""
        plain = {Config: Config.to_dict, tuple: list}
        return {name: plain.get(type(value), lambda x: x)(value) for name, value in self._children.items()}

    def save(self, path):
        """Write every key, atomically, as YAML from which `--config path` makes an equal Config."""
        atomic_write(path, lambda file: YAML().dump(self.to_dict(), file))


def load_config(argv, path):
    """Merge the defaults of the YAML file `path`, presets, --config files and flags into a Config; the last wins.

    argv: the words of the command line after the program's name; --help prints and raises SystemExit(0).
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(path))
        raise SystemExit(0)
    keys, presets, _ = _load(path)
    flags = _parse(argv, keys | dict.fromkeys(OWN_FLAGS, Setting((), "", ())))
    names, files = (flags.pop(name, ()) for name in OWN_FLAGS)
    values, given = {}, {}
    for name in names:
        if name not in presets:
            raise _unknown("preset", name, presets, "--configs ")
        values |= presets[name]
    for file in files:
        given |= _checked(keys, _read(file, yaml12().load), f"{file}: ")
    given |= flags
    values |= given
    return Config({n: key._replace(value=values.get(n, key.value), given=n in given) for n, key in keys.items()})


def help_text(path):
    """What --help prints: usage, presets, all keys with their defaults, each with its comment in the YAML file."""
    keys, presets, comments = _load(path)
    rows = [(name, comments[name]) for name in presets]
    for place, comment in comments.items():
        root, _, name = place.partition(".")
        if root == "defaults" and name:
            default = keys[name].default if name in keys else "..."
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            rows.append((f"--{name} {shown}", comment))
    wide = max(len(name) for name, _ in rows)
    lines = [f"  {name:{wide}}  {comment}".rstrip() for name, comment in rows]
    lines[len(presets) : len(presets)] = ["", "Keys, with their defaults:"]
    return "\n".join([USAGE, "", "Presets, merged over the defaults in the order given:", *lines])


def _parse(argv, keys):
    """Read a command line: {dotted key: value}."""
    words, flags = list(argv), {}
    while words:
        word = words.pop(0)
        if not FLAG.match(word):
            raise UserError(f"{word}: stray argument, options are given as --key value")
        name, equals, text = word[2:].partition("=")
        if name not in keys:
            raise _unknown("key", name, keys, "--")
        texts = [text] if equals else []
        several = isinstance(keys[name].default, tuple)
        while words and not equals and not FLAG.match(words[0]) and (several or not texts):
            texts.append(words.pop(0))
        if not texts or (name in OWN_FLAGS and "" in texts):
            raise UserError(f"--{name}: missing value")
        values = texts if name == "config" else keys[name].parse(texts)  # a file's name may have commas
        checked = _checked(keys, {name: values}, "--")
        flags |= {name: flags.get(name, ()) + checked[name]} if name in OWN_FLAGS else checked
    return flags


def _load(path):
    """Read and check defaults and presets: {name: Setting}, {preset: {name: value}}, {place: comment}."""
    try:
        about = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return _load_version(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=4)
def _load_version(path, *version):
    """What `_load` returns, of a certain version of the file: parsing takes a good part of a second."""
    data = _read(path, yaml12().load)
    if not isinstance(data, dict) or not isinstance(data.get("defaults"), dict):
        raise UserError(f"{path}: expected a mapping with a mapping called defaults")
    nodes = _read(path, _nodes)
    keys = {}
    for name, value in _flatten(data["defaults"]):
        comment, text = nodes.get(f"defaults.{name}", ("", ""))
        if isinstance(value, float) and value.is_integer() and "." not in text:
            value = int(value)  # YAML takes 1e6 for a float; written without a point it is a count
        default = tuple(value) if isinstance(value, list) else value
        keys[name] = Setting(default, comment, default)
        for part in name.split("."):
            if part in (*OWN_FLAGS, "explicit") or part.startswith("_") or hasattr(Config, part):
                raise UserError(f"{path}: defaults: {name}: the name {part} is taken")
    presets = {name: _checked(keys, tree, f"{path}: {name}: ") for name, tree in data.items()}
    del presets["defaults"]
    return keys, presets, {place: comment for place, (comment, _) in nodes.items()}


def _read(path, parse):
    """`parse` the text of a file; whatever is wrong with it is a UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except (OSError, YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or error
        where = f"{path}: line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: {' '.join(str(reason).split())}") from None


def _nodes(text):
    """{dotted place: (end-of-line comment or "", text of the value)} of a YAML mapping, in its order."""
    lines = text.split("\n")

    def walk(node, prefix):
        for key, value in node.value:
            # The comment follows the colon if the value is empty or starts on a later line, else the value.
            rests = (lines[mark.line][mark.column :].strip() for mark in (key.end_mark, value.end_mark))
            found = [match[1] for match in map(COMMENT.match, rests) if match]
            yield f"{prefix}{key.value}", (found[0] if found else "", value.value)
            if isinstance(value, MappingNode):
                yield from walk(value, f"{prefix}{key.value}.")

    return dict(walk(yaml12().compose(text), ""))


def _flatten(tree, prefix=""):
    """Yield the leaves of a nested mapping as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _checked(keys, tree, where):
    """Flatten a partial configuration and check all of it; `where` begins the messages."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}expected a mapping of keys to values")
    checked = {}
    try:
        leaves = list(_flatten(tree))
    except RecursionError:
        raise UserError(f"{where}nested without an end") from None
    for name, value in leaves:
        if value == {} and any(key.startswith(f"{name}.") for key in keys):
            continue  # an empty section
        if name not in keys:
            raise _unknown("key", name, keys, where)
        if name in checked:
            raise UserError(f"{where}{name}: given twice")
        try:
            checked[name] = keys[name].check(value)
        except ValueError as error:
            raise UserError(f"{where}{name}: {error}") from None
    return checked


def _unknown(what, name, known, where):
    """The error that names the nearest known name: a key in the section `name`, or one spelt alike."""
    near = [key for key in known if key.startswith(f"{name}.")] or difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {'--' * (where == '--')}{near[0]}?" if near else " (--help lists all)"
    return UserError(f"{where}{name}: unknown {what}{hint}")
