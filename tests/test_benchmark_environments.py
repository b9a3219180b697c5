"""The benchmark of environments: its numbers checked by hand, its tables in the page."""

import concurrent.futures
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium import spaces

from benchmarks import environments, pages, races
from benchmarks.races import make_config
from envs import SUITES, make_env, make_envs
from modalities import kind_of
from tests.factories import check_conformance, one_line_error
from training.config import CONFIGS

ROOT = CONFIGS.parent
PAGE = "top <!-- speed:begin -->old <!-- speed:end -->\n<!-- random:begin --><!-- random:end -->\nbottom\n"


@pytest.fixture
def inline(monkeypatch):
    """Measure in this process, where a test can interfere, without workers."""
    local = lambda config, mode, count: make_envs(config.replace(parallel=False), mode, count)  # noqa: E731
    for module in (environments, races):
        monkeypatch.setattr(module, "make_envs", local)
    pool = lambda number, context: concurrent.futures.ThreadPoolExecutor(number)  # noqa: E731
    monkeypatch.setattr(environments.concurrent.futures, "ProcessPoolExecutor", pool)


@pytest.fixture
def fake_clock(monkeypatch):
    """Install a clock that only the test moves: [milliseconds]."""
    now = [0]
    monkeypatch.setattr(races, "time", SimpleNamespace(perf_counter=lambda: now[0] / 1000))
    return now


def cells(line):
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]


# ---------------------------------------------------------------------------
# Command line and page


def test_speed_in_processes_of_its_own(tmp_path):
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(PAGE)
    cores = pages.all_cores()
    flags = ["--seconds", "0.05", "--write", str(page), "--json", str(out)]
    assert environments.main(["speed", "dummy_vector", *flags]) == 0
    assert pages.all_cores() == cores
    (row,) = json.loads(out.read_text())["results"]
    assert (row["task"], row["observations"], row["actions"]) == ("dummy_vector", "state 3", "action 2")
    assert row["protocol"] == "repeat 1, limit the task's own"
    assert row["steps_per_second"] > 1 and row["steps_per_second_2_workers"] > 1 and row["reset_ms"] > 0
    text = page.read_text()
    before, table, after = re.split("<!-- speed:begin -->|<!-- speed:end -->", text)
    assert before + after == PAGE.replace("<!-- speed:begin -->old <!-- speed:end -->", "")
    head, _, line, empty, about = table.strip().split("\n")
    assert len(cells(head)) == len(cells(line)) == 10 and cells(line)[0] == "`dummy_vector`"
    assert not empty and "cores" in about


def test_what_cannot_be_made_is_a_row(monkeypatch, inline, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    out = tmp_path / "out.json"
    tasks = ["dmc_cartpole_balance", "dummy_discrete", "nosuch_task"]
    assert environments.main(["speed", *tasks, "--seconds", "0.01", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["presets"] for row in rows] == ["dmc_proprio", "dmc_vision", "", "", ""]
    assert "pip install -r requirements/dmc.txt" in rows[0]["failed"] and "unknown suite" in rows[4]["failed"]
    assert "failed" not in rows[3] and rows[3]["actions"] == "action discrete 2"
    lines = capsys.readouterr().out.split("\n")[2:7]
    assert [cells(line)[6].partition(":")[0] for line in lines] == ["no", "no", "no", "yes", "no"]
    assert all(cells(line)[7] == "-" for line in lines if "no:" in line)


def test_an_unexpected_error_is_a_row(monkeypatch, inline):
    def broken(*args):
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(races, "make_env", broken)
    results = environments.overhead(SimpleNamespace(seconds=0.01))
    assert [row["failed"] for row in results] == ["ZeroDivisionError: a b"] * 3
    assert environments.overhead_table(results).count("ZeroDivisionError") == 3


def test_checks_are_timed_on_what_an_environment_gives():
    row = environments.time_checks(("", "gym_CartPole-v1"), 0.01)
    assert 0 < row["checks"] < row["step"]
    lines = environments.checks_table([{"task": "a", **row}, {"task": "b", "failed": "why"}]).splitlines()
    assert cells(lines[2])[3].endswith("%") and cells(lines[3])[3] == "why"


def test_put_between():
    once = pages.put_between(PAGE, "speed", "| new |")
    assert once == PAGE.replace("old ", "\n| new |\n")
    assert pages.put_between(once, "speed", "| new |") == once
    for page in ("", "<!-- speed:begin -->", "<!-- speed:end --><!-- speed:begin -->", PAGE + PAGE):
        assert "<!-- speed:begin -->" in one_line_error(pages.put_between, page, "speed", "")


def test_mistakes_are_found_before_anything_is_measured(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for argv, hint in (
        (["overhead", "--write", str(page)], "<!-- overhead:begin -->"),
        (["speed", "--write", str(tmp_path / "none.md")], "none.md"),
        (["random", "--episodes", "1"], "--episodes at least 2"),
        (["speed", "--seconds", "0"], "--seconds must be above 0"),
    ):
        assert environments.main(argv) == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1
    assert page.read_text() == PAGE


def test_the_page_and_the_tables_cover_everything():
    for name in environments.COMMANDS:
        page = "reliability.md" if name == "checks" else "environments.md"
        pages.put_between((ROOT / "docs" / page).read_text(), name, "")
    assert {task.partition("_")[0] for _, task in environments.TASKS} == SUITES.keys() - {"custom"}
    for presets, task, *_ in (*environments.TASKS, *environments.RANDOM):
        assert make_config(presets, task).task == task


def test_the_example_of_the_page_works(tmp_path, monkeypatch):
    code = re.search("```python\n(.*?)```", (ROOT / "docs" / "environments.md").read_text(), re.S)[1]
    (tmp_path / "cave.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    env = make_env(make_config("", "custom_cave:Cave"), "train", 0)
    assert env.obs_space.keys() == {"state"}
    ends = [obs for obs in check_conformance(env, 250) if obs["is_last"]]
    assert any(not obs["is_terminal"] for obs in ends)
    obs = env.reset()
    while not obs["is_last"]:
        obs = env.step({"action": -10 * obs["state"]})
    assert obs["is_terminal"]


# ---------------------------------------------------------------------------
# Speed and overhead


def test_words():
    env = make_env(make_config("", "dummy_multi"), "train", 0)
    assert environments.describe(env.obs_space) == "image 64x64x3, state 2, phase discrete 3"
    assert environments.describe(env.act_space) == "move 2, mode discrete 3"
    assert environments.describe({"keys": spaces.MultiDiscrete([2, 3])}) == "keys discrete 2·3"
    image = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    assert kind_of(image["image"]) == "image"
    words = environments.protocol(make_config("atari100k", "atari100k_pong", "--time_limit", "400"), image)
    assert {"repeat 4", "size 64x64", "sticky 0.0", "noops 30"} <= set(words.split(", "))
    numbers = [4708.3, 100.4, 99.96, 15.27, 0.2731, math.nan]
    assert list(map(pages.digits, numbers)) == ["4,710", "100", "100", "15.3", "0.273", "-"]


def test_resets_take_time_but_are_no_steps(fake_clock):
    taken = iter([1, 1, 0, 1, 0])  # 10 ms each

    def step():
        fake_clock[0] += 10
        return next(taken)

    assert races.seconds_per_step(step, 0.035) == pytest.approx(0.040 / 3)


def test_steps_are_counted_as_the_agent_counts_them():
    envs = make_envs(make_config("", "dummy_vector"), "train", 3)  # episodes of 20 steps
    step = races.together(envs, races.draw_actions(envs.act_space, 3, number=7))
    assert [step() for _ in range(42)] == [*[3] * 20, 0] * 2
    env = make_env(make_config("", "dummy_vector"), "train", 0)
    step = races.alone(env, races.draw_actions(env.act_space, 1, number=7))
    assert [step() for _ in range(42)] == [*[1] * 20, 0] * 2


def test_contestants_take_turns(fake_clock):
    order = []

    def contestant(name, cost, steps):
        def step():
            order.append(name)
            fake_clock[0] += cost
            return steps

        return [], step

    contestants = {"slow": contestant("slow", 50, 1), "two": contestant("two", 50, 2), "lag": contestant("lag", 60, 1)}
    times = races.interleave(contestants, seconds=0.18, turn=0.09)
    assert order == ["slow", "slow", "two", "two", "lag", "lag"] * 3  # the first round is not counted
    assert {name: found.tolist() for name, found in times.items()} == {
        "slow": pytest.approx([0.05] * 2),
        "two": pytest.approx([0.025] * 2),
        "lag": pytest.approx([0.06] * 2),
    }
    table = environments.overhead_table([{"race": "R", **races.standings(times)}])
    assert [cells(line)[1:] for line in table.split("\n")[2:]] == [
        ["slow", "50,000", "20", "+0 % (+0 to +0)", "1.00"],
        ["two", "25,000", "40", "-50 % (-50 to -50)", "2.00"],
        ["lag", "60,000", "16.7", "+20 % (+20 to +20)", "0.83"],
    ]


def test_ratios_are_taken_within_rounds():
    times = {"one": np.array([1.0, 10.0, 2.0]), "other": np.array([1.5, 12.0, 2.6])}  # 1.5, 1.2, 1.3
    found = races.standings(times)
    assert found["us"] == {"one": 2e6, "other": 2.6e6}
    np.testing.assert_allclose(found["ratio"]["other"], [1.25, 1.3, 1.4])


def test_races(inline):
    cores = pages.all_cores()
    try:
        found = races.race_bare(races.alone, ["", "dummy_vector"], 0.1, cores)
        assert list(found["us"]) == ["bare", "make_env", "one worker"] and min(found["us"].values()) > 0
        assert found["ratio"]["bare"] == [1, 1, 1]
        found = races.race_workers(2, ["", "dummy_vector"], 0.1, cores)
        assert list(found["us"]) == ["make_env, one core", "make_env, two cores", "2 workers, two cores"]
    finally:
        races.pin(cores)


def test_bare_walker():
    env = SimpleNamespace(act_space={"action": spaces.Box(-1, 1, (6,))})
    step = races.bare_walker(env, races.draw_actions(env.act_space, 1))
    assert [step() for _ in range(502)] == [*[1] * 500, 0, 1]  # 1000 frames by two


@pytest.mark.parametrize("channels, choices", [(1, 18), (3, 6)])
def test_bare_pong(channels, choices):
    pytest.importorskip("ale_py")
    image = spaces.Box(0, 255, (96, 96, channels), np.uint8)
    env = SimpleNamespace(obs_space={"image": image}, act_space={"action": spaces.Discrete(choices)})
    step = races.bare_pong(env, races.draw_actions(env.act_space, 1))
    assert sum(step() for _ in range(20)) == 20


# ---------------------------------------------------------------------------
# The random agent


def test_random_agent_by_hand():
    # Targets and actions are uniform on [-1, 1], and lie 2/3 apart on average: 20 steps of 1 - 2/3.
    found = environments.play("", "dummy_vector", 50)
    assert (found["episodes"], found["frames"], found["longest"]) == (50, 20, 20)
    assert found["mean"] == pytest.approx(20 / 3, abs=4 * found["error"]) and 0.1 < found["error"] < 0.3
    assert found == environments.play("", "dummy_vector", 50)
    assert "published" not in found


def test_random_command(inline, capsys):
    assert environments.main(["random", "dummy_discrete", "--episodes", "4", "--processes", "2"]) == 0
    row = cells(capsys.readouterr().out.split("\n")[2])
    assert row[0] == "`dummy_discrete`" and row[3] == "4" and row[-2:] == ["-", "-"]


def test_statistics_by_hand():
    mean, error = pages.mean_and_error([1, 2, 3, 4])
    assert (mean, error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))


def test_crafter_score_by_hand():
    episodes = [{f"log_achievement_{i}": i == 0 or (i == 1 and t == 0) for i in range(22)} for t in range(4)]
    found = environments.crafter(episodes)  # 100 %, 25 % and twenty times 0 %
    assert found["score"] == pytest.approx((101 * 26) ** (1 / 22) - 1)
    assert 0 < found["score_error"] < 0.2
    assert environments.crafter(episodes[1:])["score_error"] == pytest.approx(0, abs=1e-9)
    assert "22 achievements, but episodes log 1" in one_line_error(environments.crafter, [{"log_achievement_0": True}])


def test_beside_the_published():
    assert environments.published("atari100k_ms_pacman") == {"published": 307.3, "by": "random"}
    assert environments.published("crafter_reward") == {"published": 2.1, "published_score": 1.6, "by": "random"}
    assert environments.published("dmc_walker_walk") == {"published": 36.3, "by": "PPO, first 20,000 frames"}
    assert environments.published("gym_CartPole-v1") == {}
    row = {"mean": 3.0, "error": 0.5, "published": 2.0, "by": "random"}
    assert environments.beside(row, "mean", "error", "published") == ["3.00 ± 0.50", "2", "+2.0 s.e."]
    assert environments.beside({**row, "error": 0.0}, "mean", "error", "published")[2] == "-"
    assert environments.beside({**row, "by": "PPO"}, "mean", "error", "published")[1:] == ["2 (PPO)", "-"]
    assert environments.beside(row, "mean", "error", "published_score")[1:] == ["-", "-"]
