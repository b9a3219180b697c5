"""Strict configuration: defaults, presets, --config files and flags are merged into one immutable Config.

Nothing is accepted in silence: every key must be among the defaults or in an open section, every value must be what
its key allows, and any mistake is a `tools.UserError` of one line. The comments in configs.yaml say what may stand
there. Presets are parsed when they are asked for, so that --help and a typo answer at once; `load_presets` checks all.
"""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from tools import UserError, atomic_write
from training.completion import completion
from training.helptext import by_flag, describe
from training.hints import of_key, of_stray, unknown
from training.settings import Leaves, Setting, Settings, checked, declare, find, flatten, merged, related, yaml12

Path = str | pathlib.Path
CONFIGS = pathlib.Path(__file__).parents[1] / "configs.yaml"
OWN_FLAGS = ("configs", "config", "presets")
FLAG = re.compile(r"--[A-Za-z_]")  # so that values such as -1 and $^ are not taken for flags
NAME = re.compile(r"[\w.]+")  # all else in a preset is a pattern
SECTION = re.compile(r"([\w.-]+):(?=\s|$)(?:.*[ \t]#+[ \t]*(.*))?")  # a first line: the name and the comment
HEADING = re.compile(
    r"^(?:[ \t]*|\S.*)\n  # (.*)(?:\n  #.*)*\n  ([\w.]+):", re.MULTILINE
)  # a comment behind an empty line, and a key
WORDS = ("include", "last")  # what a preset may say beside keys
HERE = ("logdir", "script", "device", "graphs", "threads", "from_checkpoint", "offline_traindir", "log_level", "logger")
LARGEST, DEEPEST = 10_000, 100  # values of a file that has aliases; brackets within brackets
RETIRED = {  # keys of older versions: their defaults
    "imag_weight": "predicted",
    "actor.baseline": True,
    "critic.slow_target": False,
    "disag_action_cond": True,
    "loss_scales.disag": 1.0,
}
IMPLIED = {"encoder.text_keys": "", "encoder.audio_keys": ""}  # in runs of older versions, which did not have them
SWITCHES = ("imag_weight", "actor.baseline", "critic.slow_target")
SWITCHED = {  # behaviors that older versions chose by those three
    "dreamerv2": ("shifted", False, True),
    "dreamerv1": ("shifted", False, False),
    "dreamerv3_2023": ("true_start", True, False),
}
VERSIONS = {"cem": "planet", **{name: name for name in SWITCHED}}  # of the behaviors that are not DreamerV3's


class Config:
    """Immutable nested configuration: `config.actor` is a Config, `config.actor.layers` is `config["actor.layers"]`.

    Lists are tuples. `explicit` is the set of dotted keys that the user gave by flags or --config files.
    An unknown name is an AttributeError, or a KeyError in brackets. No key has a name in `settings.TAKEN`.
    """

    explicit: frozenset[str]
    _children: dict[str, Any]
    _settings: Settings

    def __init__(self, settings: Settings) -> None:
        children: dict[str, Any] = {}
        for name, setting in settings.items():
            section, dot, _ = name.partition(".")
            if not dot and section:  # without a name: this section is open
                children[name] = setting.value
            elif dot and section not in children:
                inside = [full for full in settings if full.startswith(f"{section}.")]
                children[section] = Config({full.partition(".")[2]: settings[full] for full in inside})
        explicit = frozenset(name for name, setting in settings.items() if setting.given)
        vars(self).update(children, explicit=explicit, _children=children, _settings=settings)

    def __setattr__(self, name: str, *value: Any) -> None:
        raise AttributeError(f"a Config is immutable: use config.replace({name}=...)")

    __delattr__ = __setattr__

    if TYPE_CHECKING:  # the keys, which the file of the defaults names

        def __getattr__(self, name: str) -> Any: ...

    def __getitem__(self, name: str) -> Any:
        return self._settings[name].value

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Config) else NotImplemented

    def replace(self, **changes: Any) -> "Config":
        """Return a Config with other values (by dotted keys or nested mappings), checked likewise; `explicit` stays."""
        return Config(merged(self._settings, checked(self._settings, flatten(changes, ""), "")))

    def to_dict(self) -> dict[str, Any]:
        """Return a nested dict of plain types, lists as lists."""
        return {name: _thawed(value) for name, value in self._children.items()}

    def save(self, path: Path) -> None:
        """Write every key, atomically, as YAML from which `--config path` makes an equal Config."""
        atomic_write(path, lambda file: YAML().dump(self.to_dict(), file))


def _thawed(value: Any) -> Any:
    """Return a value of a Config in plain types."""
    if isinstance(value, Config):
        return value.to_dict()
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def load_config(
    argv: Sequence[str], path: Path, saved: Path | None = None, warn: Callable[[str], None] = lambda line: None
) -> Config:
    """Merge the defaults of the YAML file `path`, presets, --config files and flags into a Config; the last wins.

    Args:
      argv: the words of the command line after the program's name; --help and --completion print and raise
        SystemExit(0).
      saved: the config.yaml of a run, which goes before other --config files. Another version may have written it:
        keys that this one does not know are left out, after `warn(line)`.
    """
    schema = _load(path)
    if {"-h", "--help", "--completion"} & set(argv):
        words = by_flag(argv, FLAG)
        _expect(words)
        schema = _with_presets(schema, words.get("presets", []))
        print(completion(schema) if "completion" in words else describe(schema, words["help"]))
        raise SystemExit(0)
    own, flags = _parse(argv, schema)
    _expect(own)
    new = set(own["configs"]) - schema.presets.keys()
    files = [file for file in own["config"] if new & _names(file)]  # of presets, not of keys
    schema = _with_presets(schema, own["presets"] + files)
    own["config"] = [file for file in own["config"] if file not in files]
    for name in own["configs"]:
        if name not in schema.presets:
            raise unknown("preset", name, schema.presets, "--configs ")
    values = _stacked(schema, own["configs"])
    given: Leaves = _saved(schema.keys, saved, warn) if saved else []
    if (behavior := dict(given).get("behavior")) in VERSIONS:  # older ones name no version: this one's goes below
        values.append(("version", VERSIONS[behavior]))
    values += _implied(schema.keys, given) if saved else []
    given += [leaf for file in own["config"] for leaf in _file(schema.keys, file)]
    return Config(merged(merged(schema.keys, values), given + flags, given=True))


def load_presets(path: Path) -> dict[str, dict[str, Any]]:
    """Check every preset of a YAML file; return {name: {dotted key: value}}, patterns and includes resolved."""
    schema = _load(path)
    return {name: dict(_preset(schema, name)) for name in schema.presets}


def help_text(path: Path, words: Sequence[str] = ()) -> str:
    """Return what --help prints: of everything, or of the keys, sections and presets that `words` name."""
    return describe(_load(path), words)


def beside(config: Config, file: Path, warn: Callable[[str], None] = lambda line: None) -> Config:
    """Return a Config that is that of a checkpoint, as the config.yaml beside it says, under what the user gave.

    Keys of the machine and of what is to be done (HERE) stay as they are. Without a file all do. Raises UserError where
    the file is wrong.
    """
    if not pathlib.Path(file).is_file():
        return config
    leaves = _saved(config._settings, file, warn)
    leaves += _implied(config._settings, leaves)
    own = {*HERE, *config.explicit}
    return Config(
        merged(config._settings, [leaf for leaf in leaves if leaf[0] not in own and not related(leaf[0], own)])
    )


def key_meant(name: str, path: Path = CONFIGS) -> str:
    """Return the key that another name may mean, or an empty text."""
    keys = _load(path).keys
    return name if name in keys else of_key(name, list(keys))


def settings_of(config: Config) -> Settings:
    """Return {dotted name: Setting} of a configuration: what each of its keys allows."""
    return config._settings


def read_tree(file: Path) -> Any:
    """Return what a YAML or JSON file holds. Raises UserError, with the line, where it is neither."""
    return _parsed(file, _read(file), yaml12())


# ---------------------------------------------------------------------------
# The file of the defaults and presets


class Section(NamedTuple):
    """A top-level section of a YAML file, not parsed yet: the lines before it, its text, the comment at its name."""

    path: Path
    line: int
    text: str
    help: str


class Schema(NamedTuple):
    """The content of a file such as configs.yaml.

    `helps` are of keys and sections, in the file's order; `headings` stand in it above the first key of some.
    """

    keys: Settings
    helps: dict[str, str]
    headings: dict[str, str]
    presets: dict[str, Section]


class _WholeNumbers(SafeConstructor):
    """Take 1e6, written without a point, for a whole number."""

    def construct_yaml_float(self, node: Any) -> float:
        value = super().construct_yaml_float(node)
        return int(value) if value.is_integer() and "." not in node.value else value


_WholeNumbers.add_constructor("tag:yaml.org,2002:float", _WholeNumbers.construct_yaml_float)


def _load(path: Path) -> Schema:
    """Read the defaults of a file and tell its presets apart."""
    sections = _sections(path)
    if "defaults" not in sections:
        raise UserError(f"{path}: expected a mapping called defaults")
    defaults = sections.pop("defaults")
    keys, helps = _declared(defaults)
    headings = {match[2]: match[1] for match in HEADING.finditer(defaults.text)}
    return Schema(keys, helps, headings, sections)


def _sections(path: Path) -> dict[str, Section]:
    """Return the top-level sections of a file."""
    head, *texts = re.split(r"^(?=[^\s#])", _read(path), flags=re.MULTILINE)
    line = head.count("\n")
    sections: dict[str, Section] = {}
    for text in texts:
        match = SECTION.match(text)
        if not match or match[1] in sections:
            problem = f'found duplicate key "{match[1]}"' if match else "expected a name and a colon"
            raise UserError(f"{path}: line {line + 1}: {problem}")
        sections[match[1]] = Section(path, line, text, match[2] or "")
        line += text.count("\n")
    return sections


def _with_presets(schema: Schema, files: Sequence[str]) -> Schema:
    """Return a schema with the presets of the user's own files, too."""
    presets = dict(schema.presets)
    for file in files:
        sections = _sections(file)
        for name in sections:
            if name in presets or name == "defaults":
                raise UserError(f"{file}: {name}: this name is taken, give the preset another")
        if not sections:
            raise UserError(f"{file}: expected presets, each a name, a colon and keys")
        presets |= sections
    return schema._replace(presets=presets)


@functools.lru_cache(maxsize=4)
def _declared(section: Section) -> tuple[Settings, dict[str, str]]:
    """Return the keys that the defaults declare, and the help of keys and sections. They are shared, as in `_tree`."""
    return declare(_tree(section, _WholeNumbers), f"{section.path}: defaults: ")


@functools.lru_cache(maxsize=256)
def _tree(section: Section, constructor: type = SafeConstructor) -> Any:
    """Parse the value of a top-level section. It is shared: not to be changed."""
    yaml = yaml12()
    yaml.Constructor = constructor
    return next(iter(_parsed(section.path, "\n" * section.line + section.text, yaml).values()))


def _stacked(schema: Schema, names: Sequence[str]) -> Leaves:
    """Return what presets set, one over the other.

    One that says `last: true` lies over the others, wherever it stands, but leaves the task to them if they name one.
    """
    values: Leaves = []
    for last in (False, True):
        for name in names:
            tree = _tree(schema.presets[name])
            if (isinstance(tree, dict) and tree.get("last") is True) == last:
                kept = last and "task" in dict(values)
                values += [leaf for leaf in _preset(schema, name) if not (kept and leaf[0] == "task")]
    return values


def _preset(schema: Schema, name: str, above: tuple[str, ...] = ()) -> Leaves:
    """Return what a preset sets, after what it includes. `above`: the presets that include it."""
    section = schema.presets[name]
    where = f"{section.path}: {name}: "
    if name in above:
        raise UserError(f"{where}include: goes round in a circle ({' > '.join([*above, name])})")
    tree = _tree(section)
    words = {word: tree[word] for word in WORDS if isinstance(tree, dict) and word in tree}
    if not isinstance(words.get("last", True), bool):
        raise UserError(f"{where}last: expected true or false, got {words['last']!r}")
    included = words.get("include", [])
    values: Leaves = []
    for other in included if isinstance(included, list) else [included]:
        if not isinstance(other, str) or other not in schema.presets:
            raise unknown("preset", str(other), schema.presets, f"{where}include: ")
        values += _preset(schema, other, (*above, name))
    leaves = [leaf for leaf in flatten(tree, where) if leaf[0].partition(".")[0] not in words]
    return values + checked(schema.keys, _expanded(schema.keys, leaves, where), where)


def _expanded(keys: Settings, leaves: Leaves, where: str) -> Leaves:
    """Put what a pattern matches in its place. What a preset names goes before what it matches."""
    named: Leaves = []
    matched: dict[str, Any] = {}
    for name, value in leaves:
        if NAME.fullmatch(name) or find(keys, name):
            named.append((name, value))
            continue
        try:
            hits = [key for key, setting in keys.items() if not setting.open and re.fullmatch(name, key)]
        except re.error as error:
            raise UserError(f"{where}{name}: neither a key nor a pattern: {error}") from None
        if not hits:
            raise UserError(f"{where}{name}: matches no key")
        matched |= dict.fromkeys(hits, value)
    names = {name for name, _ in named}
    return [(name, value) for name, value in matched.items() if name not in names] + named


def _read(path: Path) -> str:
    """Return the text of a file."""
    with _errors_of(path), open(path, encoding="utf-8-sig") as file:
        return file.read()


def _parsed(path: Path, text: str, yaml: YAML) -> Any:
    """Return what a text of a file is in YAML."""
    with _errors_of(path):
        opening = (1 if bracket in "[{" else -1 for bracket in re.sub(r"[^][{}]", "", text))
        if max(itertools.accumulate(opening), default=0) > DEEPEST:  # which the parser would take minutes to find
            raise RecursionError
        if "*" in text and "&" in text and _unfolded(yaml.compose(text), {}) > LARGEST:
            raise ValueError(f"its aliases unfold to more than {LARGEST:,} values")
        return yaml.load(text)


def _unfolded(node: Any, known: dict[int, float]) -> float:
    """Return how many values a node of YAML stands for when each alias in it is what it names.

    known: {id: that number} of the nodes below which it was counted already, infinite while it is being counted.
    """
    if node is None:  # of an empty file
        return 0
    if id(node) not in known:
        known[id(node)] = math.inf
        below = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else [pair])]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in below if not isinstance(part, str))
    return known[id(node)]


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn whatever is wrong with a file into a UserError that names the place."""
    try:
        yield
    except (OSError, YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        error = ValueError("nested too deeply") if isinstance(error, RecursionError) else error
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or error
        where = f"{path}: line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: {' '.join(str(reason).split())}") from None


# ---------------------------------------------------------------------------
# The command line, and what older versions wrote


def _parse(argv: Sequence[str], schema: Schema) -> tuple[dict[str, list[str]], Leaves]:
    """Read a command line: the words of each flag in OWN_FLAGS, and the values of the other flags."""
    words, flags, before = list(argv), [], ""
    own: dict[str, list[str]] = {name: [] for name in OWN_FLAGS}
    while words:
        word = words.pop(0)
        if not FLAG.match(word):
            raise UserError(of_stray(word, before, schema.keys, schema.presets))
        name, equals, text = word[2:].partition("=")
        retired = Setting(RETIRED[name]) if name in RETIRED else None
        setting = Setting(()) if name in own else find(schema.keys, name) or retired
        if not setting:
            raise unknown("key", name, [*schema.keys, *own, "help"], "--")
        texts = [text] if equals else []
        several = setting.open or isinstance(setting.default, tuple)
        while words and not equals and not FLAG.match(words[0]) and (several or not texts):
            texts.append(words.pop(0))
        if not texts and isinstance(setting.default, bool) and setting is not retired:
            texts = ["true"]  # --parallel
        if not texts or (name in own and "" in texts):
            raise UserError(f"--{name}: missing value")
        before = " ".join([f"--{name}", *texts])
        if name in own:
            own[name] += setting.parse(texts) if name == "configs" else texts  # a file's name may have commas
        else:
            flags += checked(schema.keys, _modern(schema.keys, [(name, setting.parse(texts))], "--"), "--")
    return own, flags


def _expect(own: Mapping[str, list[str]]) -> None:
    """Raise UserError, with the flag, for a file that is not there. own: {flag: its words}."""
    for flag in ("config", "presets"):
        for file in own.get(flag, []):
            with _errors_of(f"--{flag} {file}"):
                os.stat(file)  # opened once only: it may be a pipe


def _saved(keys: Settings, file: Path, warn: Callable[[str], None]) -> Leaves:
    """Return what the config.yaml of a run sets, but for keys that this version does not know, after `warn(line)`."""
    where = f"{file}: "
    leaves = _modern(keys, flatten(_parsed(file, _read(file), yaml12()), where), where)
    lost = [name for name, value in leaves if value != {} and not find(keys, name)]
    if lost:
        warn(f"{where}ignored keys that this version does not know: {', '.join(lost)}")
    return checked(keys, [leaf for leaf in leaves if leaf[0] not in lost], where)


def _implied(keys: Settings, leaves: Leaves) -> Leaves:
    """Return what keys meant that a run did not have yet."""
    known = dict(leaves)
    return [(name, value) for name, value in IMPLIED.items() if name in keys and name not in known]


def _file(keys: Settings, file: Path) -> Leaves:
    """Return what a file of keys sets."""
    where = f"{file}: "
    leaves = flatten(_parsed(file, _read(file), yaml12()), where)
    advice = "; if another version wrote it, delete it there"
    return checked(keys, _modern(keys, leaves, where), where, advice)


def _names(file: Path) -> set[str]:
    """Return the names at the top level of a YAML file."""
    tree = _parsed(file, _read(file), yaml12())
    return set(tree) if isinstance(tree, dict) else set()


def _modern(keys: Settings, leaves: Leaves, where: str) -> Leaves:
    """Translate what older versions wrote: chosen behaviors get their names, retired keys go where they say nothing."""
    retired = {name: value for name, value in leaves if name in RETIRED and name not in keys}
    leaves = [(name, value) for name, value in leaves if name not in retired]
    behavior = dict(leaves).get("behavior", "actor_critic")
    for name, switches in SWITCHED.items() if behavior == "actor_critic" else ():
        if tuple(retired.get(switch) for switch in SWITCHES) == switches:
            retired = {name: value for name, value in retired.items() if name not in SWITCHES}
            leaves = [leaf for leaf in leaves if leaf[0] != "behavior"] + [("behavior", name)]
            break
    for name, value in retired.items():
        if value != RETIRED[name]:
            default = str(RETIRED[name]).lower()
            raise UserError(f"{where}{name}: this key is retired; only its old default, {default}, is still accepted")
    return leaves
