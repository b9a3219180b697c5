"""A short form of benchmarks/attack.py, and that it would see a broken promise."""

import collections
import json
import random

import numpy as np
import pytest

from benchmarks import attack, attack_damage, attack_kills, attack_soak, attack_spaces
from replay.episodes import save_episode


def broken(module, seen):
    return {name: seen[name] for name in module.BROKEN if seen[name]}


def test_killed_runs_lose_nothing():
    seen = attack_kills.attack_kills(1)
    assert seen["kills"] == 1 and seen["runs"] >= 2 and seen["finished episodes seen"] > 0
    assert broken(attack_kills, seen) == {}


def test_lost_and_repeated_episodes_are_seen(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [{"reward": rng.random(4, np.float32), "state": rng.random((4, 2))} for _ in range(3)]
    (tmp_path / "train_eps").mkdir()
    for episode in episodes:
        path = save_episode(tmp_path / "train_eps", episode)
    scores = [{"mode": "train", "score": float(each["reward"].sum()), "length": 3} for each in episodes]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))
    seen = collections.Counter()
    known = attack_kills.check(tmp_path, collections.Counter(), seen)
    assert seen["finished episodes seen"] == 3 and broken(attack_kills, seen) == {}
    path.unlink()
    save_episode(tmp_path / "train_eps", episodes[0])
    (tmp_path / "train_eps" / "junk.npz").write_bytes(b"PK")
    (tmp_path / "scores.jsonl").write_text('{"mode":\n')
    attack_kills.check(tmp_path, known, seen)
    assert broken(attack_kills, seen) == {
        "finished episodes lost": 1,
        "episodes repeated": 1,
        "unreadable files": 1,
        "unreadable lines": 1,
    }


@pytest.fixture
def files(tmp_path):
    """Return the one file of a run that is cheap to make, and readers of it as of `make_readers`."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    return path


def test_damage_that_is_accepted_in_silence_is_seen(files):
    rng, seen = random.Random(0), collections.Counter()
    whole = files.read_bytes()
    for _ in range(200):
        how, damaged = attack_damage.damage(whole, rng)
        files.write_bytes(damaged)
        attack_damage.judge(seen, how, lambda: True if files.read_bytes() == whole else None)
    changed = seen["accepted in silence"]
    assert changed > 190 and changed + seen["read as it was"] == 200
    attack_damage.judge(seen, "a bug", lambda: [][0])
    assert seen["errors of other kinds"] == 1


def test_damaged_files_are_refused():
    seen = attack_damage.attack_damage(25)
    assert sum(counts["damaged"] for counts in seen.values()) >= 25
    assert {kind: broken(attack_damage, counts) for kind, counts in seen.items()} == {kind: {} for kind in seen}


def test_hostile_environments_are_trained_in_or_refused():
    seen = attack_spaces.attack_spaces(8)
    assert seen["environments"] == 8 and broken(attack_spaces, seen) == {}


def test_growth_is_seen():
    def rows(**growth):
        usual = {"replay_steps": 1000, "memory": 300, "descriptors": 40, "threads": 9, "/dev/shm": 1, "processes": 4}
        return [
            {"updates": 50 * t, **usual, **{name: usual[name] + per * t for name, per in growth.items()}}
            for t in range(100)
        ]

    for growth in ({}, {"memory": 0.1}, {"descriptors": 1}, {"/dev/shm": 1}):
        seen = collections.Counter(dict.fromkeys(attack_soak.BROKEN, 0))
        attack_soak.judge(rows(**growth), seen)
        assert {name.split()[0] for name in broken(attack_soak, seen)} == growth.keys()


def test_the_table_goes_into_its_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- soak:begin -->\n<!-- soak:end -->\n")
    monkeypatch.setitem(attack.ATTACKS, "soak", lambda number, seed: ({"seen": {"updates": number, "leaks": 2}}, 2))
    assert attack.main(["--soak", "1000", "--write", str(page)]) == 1
    assert "| updates | 1,000 |" in page.read_text() and "2 promises broken" in capsys.readouterr().out
