"""Every command that README.md and docs/ print is one that works."""

import pathlib
import re
import subprocess

import pytest

from benchmarks import newcomer
from envs.tasks import split_task
from training.config import CONFIGS, load_config

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = newcomer.commands()
TEXTS = {command.text: command for command in COMMANDS}


def test_the_commands_of_a_page_are_found_as_they_are_printed(tmp_path):
    page = """
Text with `make demo SEED=3` and `code()`, then:

    python3 dreamer.py --configs debug  # tiny
    source .venv/bin/activate
    python3 benchmarks/plot_scores.py 'a=b' \\
        --out c

```python
    make no
```
    pip install -r requirements/dmc.txt
"""
    (tmp_path / "page.md").write_text(page)
    found = newcomer.commands(tmp_path, ["page.md"])
    assert [(command.text, command.active) for command in found] == [
        ("make demo SEED=3", False),
        ("python3 dreamer.py --configs debug", False),
        ("source .venv/bin/activate", False),
        ("python3 benchmarks/plot_scores.py 'a=b' --out c", True),
        ("pip install -r requirements/dmc.txt", True),
    ]
    assert [command.kind for command in found][:3] == ["long", "long", "cheap"]
    assert found[-1].kind == "installs packages"


def test_one_page_can_be_walked_alone(capsys):
    assert newcomer.main(["--list", "docs/sweeps.md"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("docs/sweeps.md:", "    ")) for line in told[:-1]) and len(told) > 2
    with pytest.raises(SystemExit) as ended:
        newcomer.main(["docs/sweep.md"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("no page docs/sweep.md\n")


def test_the_first_commands_need_no_environment_and_others_come_after_it_is_active():
    assert [command.text.split()[0] for command in COMMANDS[:2]] == ["make", "make"]
    for command in COMMANDS:
        bare = re.match(r"(python3?|pip|tensorboard|wandb) ", command.text) and "-m venv" not in command.text
        assert command.active or not bare, f"{command.page}:{command.line}: {command.text}"


@pytest.mark.parametrize("text", [text for text in TEXTS if newcomer.words_of(text, "dreamer.py") is not None])
def test_a_printed_training_is_understood(text):
    words = newcomer.words_of(text, "dreamer.py")
    if not {"--help", "--completion"} & set(words) and "..." not in text and "mine.yaml" not in text:
        split_task(load_config(words, CONFIGS).task)


def test_printed_trainings_name_logdirs_of_their_own():
    """So that one can follow the pages: another task or size is refused in a logdir that is another run's."""
    taken = {}
    for text in (text for text, command in TEXTS.items() if command.kind == "long"):
        words = newcomer.words_of(text, "dreamer.py")
        if words is not None:
            assert "--logdir" in words, text
            at = words.index("--logdir")
            run = taken.setdefault(words[at + 1].removeprefix("./"), words[:at] + words[at + 2 :])
            assert run == words[:at] + words[at + 2 :], text


@pytest.mark.parametrize("text", [text for text in TEXTS if re.search(r"[\w/]+\.(py|txt)", text)])
def test_the_files_that_a_command_names_are_there(text):
    for name in re.findall(r"(?:benchmarks|requirements|docs)/\w+\.(?:py|txt)|\b(?:dreamer|inference_video)\.py", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("text", [text for text in TEXTS if text.startswith("make ")])
def test_a_printed_target_is_one(text):
    for part in text.split("&&"):
        words = part.split()
        if words[0] == "make":
            done = subprocess.run([words[0], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="there is nothing to clone")
def test_what_takes_a_moment_runs_as_printed_in_a_bare_clone(tmp_path):
    place = newcomer.clone(tmp_path)
    first = TEXTS["python3 dreamer.py --help"]
    assert first.kind == "cheap" and newcomer.run_cheap(first, place) == ""
    wrong = first._replace(text="python3 dreamer.py --hlep")
    assert "did you mean --" in newcomer.run_cheap(wrong, place)
    assert (
        "source .venv/bin/activate" in newcomer.run_cheap(first._replace(active=False), place)
        or not (place / ".venv" / "core").exists()
    )


def test_the_presets_that_a_page_shows_are_right(tmp_path):
    (shown,) = re.findall(r"```yaml\n(cave:.*?)```", (ROOT / "docs" / "running.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(shown)
    config = load_config(["--presets", str(tmp_path / "mine.yaml"), "--configs", "dmc_proprio", "cave"], CONFIGS)
    assert (config.task, config.actor.units, config.rssm.deter) == ("custom_cave:Cave", 128, 512)
