"""What the keys of a configuration allow: Settings are declared by a mapping, and values are checked against them.

A key has a dotted name. An open section takes any keys besides its own. Every mistake is a `tools.UserError` of one
line that begins with `where`, the place that it is in, such as a file's name and a colon.
"""

import contextlib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tools import UserError
from training.hints import of_value, unknown

yaml12 = functools.partial(YAML, typ="safe", pure=True)  # JSON is a part of it
Leaves = list[tuple[str, Any]]  # (dotted name, value) of the leaves of a tree, or of several: the last wins
TAKEN = ("explicit", "replace", "save", "to_dict")  # names that a Config needs for itself
RESERVED = (*TAKEN, "configs", "config", "presets", "include", "last", "completion")  # those of flags and presets
TIME = re.compile(r"\d+(\.\d+)?[smh]")
NULLS = ("null", "Null", "NULL", "~")
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list"}
ATTRIBUTES: dict[str, tuple[tuple, tuple]] = {  # their types, and those of the values that they are for
    "help": ((str,), (*EXPECTED, type(None))),
    "choices": ((list,), (int, str)),
    "min": ((int, float), (int, float)),
    "max": ((int, float), (int, float)),
    "length": ((int,), (tuple,)),
    "time": ((bool,), (int, float)),
}


class Setting(NamedTuple):
    """A key of the configuration, what it allows, and its value.

    The default gives the type: null stands for text or null, a tuple for a list of any length with elements like its
    first (text if empty). `choices`, `min` and `max` are those of a list's every element; with a `min` a list is not
    empty. A choice that ends in `:N` has any digits there, `every:N` not 0. `time` allows text such as 90s, 10m or
    1.5h, too.
    `open` allows any plain value; the Setting of an open section stands under its name and a dot.
    `given`: the value comes from the user's flags or --config files.
    """

    default: Any = None
    help: str = ""
    value: Any = None
    given: bool = False
    choices: Sequence = ()
    min: float | None = None
    max: float | None = None
    length: int | None = None
    time: bool = False
    open: bool = False

    def check(self, value: Any) -> Any:
        """Return `value` in the type of the default; raise ValueError that says what was expected."""
        if self.open:
            return _plain(value)
        if self.default is None and str(value).lower() in ("none", "null"):
            return None
        if self.time and isinstance(value, str) and TIME.fullmatch(value):
            return value
        kind: Any = str if self.default is None else type(self.default)
        if kind is tuple and isinstance(value, (list, tuple)):
            return self._check_list(value)
        if {kind, type(value)} == {int, float} and (kind is float or value % 1 == 0):
            value = kind(value)
        if kind is str and type(value) in (int, float) and str(value) in map(str, self.choices):
            value = str(value)  # precision: 32, which YAML takes for a number
        if kind is str and type(value) is bool and str(value).lower() in self.choices:
            value = str(value).lower()  # graphs: true
        if kind not in EXPECTED or type(value) is not kind:
            time = " or a time such as 10m" * self.time
            raise ValueError(f"expected {EXPECTED.get(kind, 'a single value or a list')}{time}, got {value!r}")
        _plain(value)  # a number must be finite
        patterns = {"every:N": r"every:0*[1-9]\d*"}
        choices = "|".join(patterns.get(str(c), re.escape(str(c)).replace(":N", r":\d+")) for c in self.choices)
        if choices and not re.fullmatch(choices, str(value)):
            raise ValueError(f"expected one of {', '.join(map(str, self.choices))}, got {value!r}")
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise ValueError(f"expected {self._range()}, got {value!r}")
        return value

    def parse(self, texts: Sequence[str]) -> Any:
        """Return what the words of a flag mean. What cannot be read stays text, for `check` to refuse."""
        if self.open:
            return _infer(texts)
        if isinstance(self.default, tuple):
            return [self._element().parse([item]) for text in texts for item in text.split(",") if item]
        if isinstance(self.default, bool):
            return {"true": True, "false": False}.get(texts[0].lower(), texts[0])
        for number in (int, float) if isinstance(self.default, (int, float)) else ():
            with contextlib.suppress(ValueError):
                return number(texts[0])
        return texts[0]

    def describe(self) -> str:
        """Return the line of --help: what the key is for and what it allows."""
        length = self.length is not None and f"{self.length} values"
        time = self.time and "or a time such as 10m"
        limits = [limit for limit in ("|".join(map(str, self.choices)), length, self._range(), time) if limit]
        return f"{self.help} ({', '.join(limits)})".lstrip() if limits else self.help

    def _check_list(self, values: Sequence) -> tuple:
        if self.length is not None and len(values) != self.length:
            raise ValueError(f"expected {self.length} values, got {list(values)}")
        if self.min is not None and not values:
            raise ValueError("expected at least one number")
        return tuple(self._element().check(item) for item in values)

    def _element(self) -> "Setting":
        return self._replace(default=self.default[0] if self.default else "")

    def _range(self) -> str:
        if self.min is not None and self.max is not None:
            return f"{self.min} to {self.max}"
        if self.min is not None:
            return f"at least {self.min}"
        return "" if self.max is None else f"at most {self.max}"


Settings = Mapping[str, Setting]  # by dotted names; that of an open section ends in a dot


# ---------------------------------------------------------------------------
# What the defaults declare


def declare(tree: Any, where: str) -> tuple[Settings, dict[str, str]]:
    """Return the keys {dotted name: Setting} that the defaults declare, and the help {name: text} of keys and sections.

    Args:
      tree: dict of keys' attributes, nested by sections, or else a mistake; where: str that begins the messages.
    """
    keys: dict[str, Setting] = {}
    helps: dict[str, str] = {}
    _declare(tree, "", where, keys, helps)
    return keys, helps


def _declare(tree: Any, section: str, where: str, keys: dict[str, Setting], helps: dict[str, str]) -> None:
    """Add what a section of the defaults declares; the outermost is called ""."""
    prefix = f"{section}." if section else ""
    if not isinstance(tree, dict):
        raise UserError(f"{where}{prefix and f'{section}: '}expected a mapping, got {tree!r}")
    about = {word: tree[word] for word in ("help", "open") if section and not isinstance(tree.get(word, {}), dict)}
    for word, kind in {"help": str, "open": bool}.items():
        if not isinstance(about.get(word, kind()), kind):
            raise UserError(f"{where}{prefix}{word}: expected {EXPECTED[kind]}, got {about[word]!r}")
    if section:
        helps[section] = about.get("help", "")
    if about.get("open"):
        keys[prefix] = Setting(open=True)
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if part in about:
            continue
        _check_name(name, where, RESERVED)
        if name in keys:
            raise UserError(f"{where}{name}: given twice")
        if isinstance(value, dict) and "default" in value:
            keys[name] = _leaf(value, f"{where}{name}: ")
            helps[name] = keys[name].help
        else:
            _declare(value, name, where, keys, helps)


def _leaf(attributes: dict[str, Any], where: str) -> Setting:
    """Return the Setting that the attributes of a key describe."""
    given = dict(attributes)
    default = given.pop("default")
    default = tuple(default) if isinstance(default, list) else default
    element = "" if default in ((), None) else default[0] if isinstance(default, tuple) else default
    for name, value in given.items():
        if name not in ATTRIBUTES:
            known = ", ".join(ATTRIBUTES)
            raise UserError(f"{where}{name}: unknown attribute (known: {known}; text with a comma needs quotes)")
        kinds, suited = ATTRIBUTES[name]
        if type(value) not in kinds or not {type(default), type(element)} & set(suited):
            raise UserError(f"{where}{name}: {value!r} does not go with the default {default!r}")
    setting = Setting(default, value=default, **given)
    with _naming(where):
        setting.check(default)
    return setting


# ---------------------------------------------------------------------------
# Values that the user and presets give


def flatten(tree: Any, where: str) -> Leaves:
    """Return the leaves of a nested mapping of keys to values; an empty mapping in it is a leaf.

    Args:
      tree: dict, or else a mistake; where: str that begins the messages.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where}expected a mapping of keys to values")

    def walk(tree: dict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    with _naming(where):
        return list(walk(tree, ""))


def checked(keys: Settings, leaves: Leaves, where: str, advice: str = "") -> Leaves:
    """Return leaves with their values in the types of the defaults; raise UserError for the first that is wrong.

    Args:
      keys: {dotted name: Setting}; leaves: [(dotted name, value)] of one place, each named once; where: str that
        begins the messages; advice: str that ends the one on an unknown key.
    """
    done: dict[str, Any] = {}
    for name, value in leaves:
        if value == {} and any(key.startswith(f"{name}.") for key in keys):
            continue  # an empty section
        setting = find(keys, name)
        if not setting:
            raise unknown("key", name, keys, where, advice)
        if name in done or (setting.open and related(name, done)):
            raise UserError(f"{where}{name}: given twice")
        if setting.open:
            _check_name(name, where, TAKEN)
        with _naming(f"{where}{name}: "):
            try:
                done[name] = setting.check(value)
            except ValueError as error:
                raise ValueError(f"{error}{of_value(name, value)}") from None
    return list(done.items())


def find(keys: Settings, name: str) -> Setting | None:
    """Return the Setting of a key, which may be one that the user named in an open section; None for no key.

    Args:
      keys: {dotted name: Setting}; name: str, dotted.
    """
    if not all(name.split(".")):
        return None
    if name in keys:
        return keys[name]
    declared = [key for key in related(name, keys) if not keys[key].open]
    inside = any(setting.open and key[-1:] in ("", ".") and name.startswith(key) for key, setting in keys.items())
    return Setting(open=True) if inside and not declared else None


def merged(settings: Settings, leaves: Leaves, given: bool = False) -> Settings:
    """Return settings with other values. A key that the user named takes the place of those above and below it.

    Args:
      settings: {dotted name: Setting}; leaves: [(dotted name, checked value)], the last wins; given: bool, whether they
        come from flags or --config files.
    """
    new = dict(settings)
    for name, value in leaves:
        setting = new.get(name) or Setting(open=True)
        for other in related(name, new) if setting.open else ():
            del new[other]
        new[name] = setting._replace(value=value, given=setting.given or given)
    return new


def related(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that are above or below a name: sections of it, or keys in it if it were a section."""
    return [other for other in names if other.startswith(f"{name}.") or name.startswith(f"{other}.")]


def _check_name(name: str, where: str, taken: Sequence[str]) -> None:
    """Refuse names of which a word is taken or private."""
    for word in name.split("."):
        if word in taken or word.startswith("_"):
            raise UserError(f"{where}{name}: the name {word} is taken")


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what a wrong value raises, or one that holds itself, into a UserError that begins with `where`."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = "nested without an end" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}{reason}") from None


# ---------------------------------------------------------------------------
# Values of open sections


def _infer(texts: Sequence[str]) -> Any:
    """Return the value that the words of a flag are in YAML 1.2; several words, or commas, are a list."""
    value = _scalar(texts[0])
    if len(texts) == 1 and (value != texts[0] or "," not in value):
        return value
    parts = [part for text in texts for part in ([text] if text.startswith("[") else text.split(","))]
    return [_scalar(part) for part in parts if part]


def _scalar(text: str) -> Any:
    """Return the number, truth, null, quoted text or list that a text is in YAML 1.2, else the text itself."""
    with contextlib.suppress(YAMLError, ValueError):
        value = yaml12().load(text)
        if text.startswith(("'", '"', "[")) or text in NULLS or isinstance(value, (int, float)):
            return value
    return text


def _plain(value: Any) -> Any:
    """Return a value of plain types, its lists as tuples; raise ValueError for other types and infinite numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"expected a single value or a list, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return value
