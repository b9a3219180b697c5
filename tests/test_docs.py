"""Test that pages which name flags, files and versions name those that there are."""

import ast
import re
import tomllib

from ruamel.yaml import YAML

from tests.factories import CONFIGS, ROOT
from training.config import OWN_FLAGS, load_config
from training.settings import flatten

KEYS = {name for name, _ in flatten(load_config([], CONFIGS).to_dict(), "")}
OTHERS = {"help", "checkpoint"}  # the latter of inference_video.py
MIGRATE = (ROOT / "docs" / "migrate.md").read_text()


def flags(text):
    return re.findall(r"--([A-Za-z][\w.]*)", text)


def test_the_flags_that_a_newcomer_is_told_exist():
    rows = [row.strip("|").split(" | ") for row in MIGRATE.splitlines() if row.startswith("| ")]
    named = [flag for row in rows for flag in flags(row[-1])]
    named += [flag for there, here in rows if here.lstrip().startswith("the same") for flag in flags(there)]
    prose = "\n".join(line for line in MIGRATE.splitlines() if not line.startswith("|"))
    named += flags(prose)
    assert len(named) > 90
    assert {flag for flag in named if flag not in KEYS | {*OWN_FLAGS} | OTHERS} == set()


def test_the_commands_that_a_newcomer_is_told_are_valid():
    commands = re.findall(r"^    python3 dreamer.py (.*)$", MIGRATE, re.MULTILINE)
    assert len(commands) == 4
    for words in commands:
        load_config(words.split(), CONFIGS)


def test_the_files_that_a_contributor_is_told_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+\.(?:py|md|yaml))`", text)
    assert len(names) > 15
    folders = ROOT, ROOT / "modalities" / "image"
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []


def test_the_citation_has_what_its_format_asks_for():
    cited = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text())
    assert cited.keys() >= {"cff-version", "message", "title", "authors"} and cited["cff-version"] == "1.2.0"
    assert cited["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for reference in cited["references"]:
        assert reference.keys() >= {"type", "title", "authors"} and reference.keys() & {"doi", "url"}


def test_the_methods_that_the_family_page_names_are_there():
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]
    code = {
        node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    named = re.findall(r"\b([A-Z]\w+)\.([a-z_]+)\b(?! *=)", (ROOT / "docs" / "family.md").read_text())
    assert [f"{kind}.{name}" for kind, name in named if kind in code and name not in code[kind]] == []
    assert len([kind for kind, _ in named if kind in code]) > 5
