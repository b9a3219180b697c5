"""What --help prints."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from tools import UserError, nearest, plain

WIDTH = 100  # columns
ABOUT = """\
usage: python3 dreamer.py [--configs PRESET ...] [--KEY VALUE ...]

example: python3 dreamer.py --configs dmc_proprio size12m --task dmc_cheetah_run --actor.layers 2

  --configs PRESET ...   presets over the defaults, each over those before it
  --presets FILE ...     YAML files with presets of your own, for --configs and --help
  --config FILE ...      YAML or JSON files of keys, over the presets
  --KEY VALUE            a key, over all of these; --KEY alone is true where a key is true or false
  --help [WORD ...]      this text, or what is named like the words
  --completion           a script by which bash and zsh complete all of these: source <(...)"""


def by_flag(argv: Sequence[str], flag: re.Pattern[str]) -> dict[str, list[str]]:
    """Return {flag: the words after it} of a command line that asks for help, -h as help, without any check."""
    words: dict[str, list[str]] = {"": []}
    last = ""
    for word in argv:
        if word == "-h" or flag.match(word):
            last, equals, text = word.lstrip("-").partition("=")
            last = "help" if last == "h" else last
            words.setdefault(last, []).extend([text] if equals else [])
        else:
            words[last].append(word)
    return words


def describe(schema: Any, words: Sequence[str] = ()) -> str:
    """Return usage, presets with their comments, sections, and keys with default and help.

    Args:
      schema: config.Schema; words: of all that, show the keys, sections and presets that have one of these in the name.
    Raises UserError for a word that names nothing.
    """
    presets = [(name, preset.help) for name, preset in schema.presets.items()]
    keys = [(name, *key_row(schema, name)) for name in schema.helps]
    names = [*schema.presets, *schema.helps]
    for word in words:
        if not any(plain(word) in plain(name) for name in names):
            meant = nearest(word, names)
            raise UserError(f"--help {word}: there is no such key, section or preset" + f", {meant}?" * bool(meant))
    if words:
        wanted = [plain(word) for word in words]
        shown = [row for row in presets if any(word in plain(row[0]) for word in wanted)]
        shown += [row[1:] for row in keys if any(word in plain(row[0]) for word in wanted)]
        return "\n".join(table(shown, shown))
    rows = [*presets, *(row[1:] for row in keys)]
    lines = [ABOUT, "", "Presets, merged over the defaults in the order given:", *table(presets, rows)]
    lines += ["", "Keys, with their defaults:"]
    for name, *row in keys:
        heading = schema.headings.get(name)
        lines += ["", f" {heading}"] if heading else []
        lines += table([(row[0], row[1])], rows)
    return "\n".join(lines)


def key_row(schema: Any, name: str) -> tuple[str, str]:
    """Return a key with its default, or a section, and its help."""
    if f"{name}." in schema.keys:
        return f"--{name}.NAME ...", schema.helps[name]
    if name not in schema.keys:
        return f"--{name} ...", schema.helps[name]
    default = schema.keys[name].default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"--{name} {str(shown).lower() if isinstance(shown, bool) else shown}", schema.keys[name].describe()


def table(rows: Sequence[tuple[str, str]], aligned: Sequence[tuple[str, str]]) -> list[str]:
    """Return lines of two columns, as wide as all rows of `aligned` need."""
    wide = max(len(left) for left, _ in aligned) + 4
    lines = []
    for left, right in rows:
        words = (word.replace("|", "| ") if len(word) > WIDTH - wide else word for word in right.split(" "))
        text = " ".join(words)  # in which a long list of choices may go over several lines
        first, *more = textwrap.wrap(text, WIDTH - wide, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {left:{wide - 2}}{first}".rstrip(), *(" " * wide + line for line in more)]
    return lines
