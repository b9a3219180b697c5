"""Episode files that are not what they seem, which of them are deleted, and the memory that their steps take."""

import os
import re
import socket
import time
import zipfile

import numpy as np
import pytest
import torch

from replay import memory
from replay.episodes import EpisodeWriter, by_age, check_keys, episode_files, load_episode, save_episode
from replay.npz import steps_in
from tests.factories import one_line_error
from tests.test_replay import LAYOUT, make_episode, make_replay, no_warning, play, saved_and_loaded

FALSE = "20200101T000000F000000-0123456789abcdef0123456789abcdef-{}.npz"  # a name that tells any length


# ---------------------------------------------------------------------------
# What a file claims


def test_the_length_of_a_file_is_that_of_its_arrays(tmp_path):
    path = save_episode(tmp_path, make_episode(0, 7))
    for name in (FALSE.format(10**9), "episode.npz"):
        assert steps_in(path.rename(tmp_path / name)) == 7
        path = tmp_path / name
    for content in (b"", b"PK\3\4", path.read_bytes()[:100]):
        path.write_bytes(content)
        assert steps_in(path) == 0
    np.savez(path, state=np.zeros(3))
    assert steps_in(path) == 0
    np.savez(path, reward=np.float32(3))
    assert steps_in(path) == 0


@pytest.mark.parametrize("claim", [0, 3, 10**9])
def test_a_false_length_in_a_name_deletes_no_other_episode(tmp_path, claim):
    writer = EpisodeWriter(tmp_path, 1, 1000)
    play(make_replay(), writer, 0, [10] * 3)
    (tmp_path / writer.files[0][0]).rename(tmp_path / FALSE.format(claim))
    again = EpisodeWriter(tmp_path, 1, 45)
    assert again.total == 30
    play(make_replay(), again, 30, [10])
    assert len(episode_files(tmp_path)) == 4
    play(make_replay(), again, 40, [10])
    assert len(episode_files(tmp_path)) == 4 and not (tmp_path / FALSE.format(claim)).exists()


def test_what_is_no_episode_is_neither_counted_nor_deleted(tmp_path):
    foreign = tmp_path / FALSE.format(500)
    foreign.write_text("notes")
    (tmp_path / "folder.npz").mkdir()
    writer = EpisodeWriter(tmp_path, 1, 25)
    play(make_replay(), writer, 0, [10] * 5)
    assert writer.total == 20
    assert {path.name for path in tmp_path.iterdir()} > {foreign.name, "folder.npz"}


def special(tmp_path):
    """Make one of each kind of what is no file; return their paths."""
    names = [tmp_path / f"{kind}.npz" for kind in ("folder", "pipe", "loop", "broken", "device", "socket")]
    names[0].mkdir()
    os.mkfifo(names[1])
    names[2].symlink_to(names[2])
    names[3].symlink_to(tmp_path / "nothing")
    names[4].symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        where = os.getcwd()
        os.chdir(tmp_path)  # such names are short
        server.bind("socket.npz")
        os.chdir(where)
    return names


def test_pipes_and_folders_are_skipped_in_a_line_without_being_opened(tmp_path):
    names, good = special(tmp_path), save_episode(tmp_path, make_episode(0, 20))
    replay, warnings = make_replay(), []
    replay.restore(None, by_age(episode_files(tmp_path)), warnings.append)
    assert len(replay) == 20 and EpisodeWriter(tmp_path, 1, 1000).total == 20 and good.exists()
    text = "\n".join(warnings)
    told = sum(path.name in text for path in names) + sum(map(int, re.findall(r"(\d+) more", text)))
    assert told == len(names) and len(warnings) <= len(names), text  # three by name, the others by their number


def bomb(path, shape, dtype="<f4", key="state", size=4096):
    """Write an episode whose array `key` claims a shape; its zeros are packed a thousand to one."""
    episode = {name: value for name, value in make_episode(0, 9).items() if name != key}
    np.savez_compressed(path, **episode)
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{key}.npy", "w") as file:
        file.write(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
        for _ in range(size):
            file.write(bytes(4096))


BOMBS = {
    "beyond its shape": ({"shape": (9, 3)}, "has not the size that its shape"),
    "of another shape": ({"shape": (9, 466_034), "dtype": "|u1", "size": 1024}, "has"),
    "many steps": ({"shape": (4_194_304,), "key": "reward"}, "shape"),
    "less than its shape": ({"shape": (2**40, 3), "size": 1}, "has not the size that its shape"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_an_array_that_unpacks_to_more_than_its_episode_has_is_not_unpacked(tmp_path, monkeypatch, kind):
    options, reason = BOMBS[kind]
    bomb(tmp_path / "bomb.npz", **options)
    read = zipfile.ZipExtFile.read
    most = []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda file, n=-1: most.append(n) or read(file, n))
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_episode(tmp_path / "bomb.npz", LAYOUT)
    assert min(most) >= 0 and max(most) < 2**17


def test_an_episode_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = save_episode(tmp_path, make_episode(0, 500))
    monkeypatch.setattr("replay.episodes.SMALL", 0)
    monkeypatch.setattr("replay.episodes.memory_limit", lambda: 4 * 500 * 60)
    with pytest.raises(ValueError, match=r"claims 500 steps, which take 1 MiB of memory"):
        load_episode(path, LAYOUT)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_is_packed_in_an_unusual_way_is_refused(tmp_path, method):
    path = save_episode(tmp_path, make_episode(0, 5))
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "other.npz", "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match="packed in a way that NumPy does not use"):
        load_episode(tmp_path / "other.npz", LAYOUT)


def test_arrays_of_all_orders_and_types_are_those_that_numpy_reads(tmp_path):
    rng = np.random.default_rng(0)
    state = np.asfortranarray(rng.normal(size=(9, 3)))
    for kind in ("<f8", ">f4", "<f2", "<i8"):
        arrays = make_episode(0, 9) | {"state": (10 * state).astype(kind, order="K")}
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "x.npz", **arrays)
            episode = load_episode(tmp_path / "x.npz", LAYOUT)
            for key, value in arrays.items():
                np.testing.assert_array_equal(episode[key], value.astype(LAYOUT[key][1]))


def test_files_that_do_not_fit_are_named_together_with_what_they_have(tmp_path):
    episode = make_episode(0, 9)
    for number in range(6):
        named = {"observation": episode["state"], "actions": episode["action"], "reward": episode["reward"]}
        np.savez(tmp_path / f"{number}.npz", **named)
    replay, warnings = make_replay(), []
    replay.restore(None, episode_files(tmp_path), warnings.append)
    (line,) = warnings
    assert line.startswith(f"skipped {tmp_path / '5.npz'}, 4.npz, 3.npz, 3 more: lacks ")
    assert line.endswith("it has 'actions', 'observation', 'reward'")


def test_discounts_of_zero_are_ends_where_a_file_says_nothing_else(tmp_path):
    episode = {key: value for key, value in make_episode(0, 5).items() if not key.startswith("is_")}
    np.savez(tmp_path / "x.npz", **episode, discount=np.array([1, 1, 1, 1, 0], np.float32))
    assert load_episode(tmp_path / "x.npz", LAYOUT)["is_terminal"].tolist() == [False] * 4 + [True]


# ---------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("key", ["file", "allow_pickle", "args", "self", "kwds", "arr_0", "a/b", "größe", "x" * 200])
def test_an_observation_may_be_called_anything_that_a_folder_can(tmp_path, key):
    check_keys([key])
    path = save_episode(tmp_path, make_episode(0, 4) | {key: np.arange(4.0)})
    layout = LAYOUT | {key: ((), np.float32)}
    assert load_episode(path, layout)[key].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("key", ["", "a\0b", "a\nb", "\ud800", "x" * 201, "\x1b[31m", "ü" * 101])
def test_an_observation_that_can_name_no_file_is_one_line(key):
    error = one_line_error(lambda: make_replay(layout=LAYOUT | {key: ((), np.float32)}))
    assert "can name no file" in error and error.isprintable() and error.isascii()


def test_names_tell_the_time_in_utc(tmp_path, monkeypatch):
    for zone in ("Asia/Tokyo", "America/New_York"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        name = save_episode(tmp_path, make_episode(0, 3)).name
        told = time.mktime(time.strptime(name[:15], "%Y%m%dT%H%M%S")) - time.timezone
        assert abs(told - time.time()) < 60 or abs(told - time.time() + 3600) < 60  # daylight saving is no matter
    monkeypatch.delenv("TZ")
    time.tzset()


def test_the_oldest_file_is_deleted_first_whatever_its_name_says(tmp_path):
    writer = EpisodeWriter(tmp_path, 1, 1000)
    play(make_replay(), writer, 0, [10] * 3)
    names = [f"2030010{day}T000000F000000-{day}-10.npz" for day in (3, 2, 1)]  # clocks that were set back
    for age, ((path, _), name) in enumerate(zip(writer.files, names, strict=True)):
        os.utime(path.rename(tmp_path / name), (1000 + age, 1000 + age))
    again = EpisodeWriter(tmp_path, 1, 35)
    play(make_replay(), again, 30, [10])
    assert {path.name for path in episode_files(tmp_path)} > {*names[1:]} and not (tmp_path / names[0]).exists()


# ---------------------------------------------------------------------------
# At capacity


@pytest.mark.parametrize("streams", [1, 2])
def test_a_replay_at_capacity_resumes_with_all_that_it_held(tmp_path, streams):
    replay = make_replay(streams=streams, capacity=36)
    writer = EpisodeWriter(tmp_path, streams, 36, replay.names)
    start = 0
    for _ in range(5):
        start = play(replay, writer, start, [9, 7, 5, 8])
        saved = saved_and_loaded(replay, tmp_path / "replay.pt")
        again = make_replay(streams=streams, capacity=36)
        again.restore(saved, by_age(episode_files(tmp_path)), no_warning)
        assert len(again) == len(replay)
        for one, other in zip(replay.streams, again.streams, strict=True):
            assert (one.start, one.stop) == (other.start, other.stop)
            for key in one.data:
                np.testing.assert_array_equal(one.data[key], other.data[key], err_msg=key)
    on_disk = sum(map(steps_in, episode_files(tmp_path)))
    assert 36 <= on_disk < 36 + streams * 9 + 9  # parts of the oldest, of each stream


def test_a_file_that_is_held_is_not_deleted_and_the_next_one_is(tmp_path):
    held = set()
    writer = EpisodeWriter(tmp_path, 1, 25, lambda: held)
    play(make_replay(), writer, 0, [10, 10])
    held.add(writer.files[0][0].name)
    play(make_replay(), writer, 20, [10, 10])
    rewards = [int(load_episode(path, LAYOUT)["reward"][0]) for path, _ in writer.files]
    assert rewards == [0, 30] and len(episode_files(tmp_path)) == 2
    held.clear()
    play(make_replay(), writer, 40, [10])
    assert [int(load_episode(path, LAYOUT)["reward"][0]) for path, _ in writer.files] == [30, 40]


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.pop("streams"),
        lambda saved: saved.update(streams=3),
        lambda saved: saved["streams"][0].update(stop="x"),
        lambda saved: saved["streams"][0].update(stop=3),
        lambda saved: saved["streams"][0]["episodes"].append(("x.npz", 10**12)),
        lambda saved: saved["streams"][0]["episodes"].append(("x.npz", -5)),
        lambda saved: saved["streams"][0].update(deter=torch.zeros(3, 4)),
        lambda saved: saved["streams"][0].update(deter=torch.zeros(20, 5, dtype=torch.float16)),
        lambda saved: saved["streams"][0].update(stoch=torch.zeros(20, 2)),
        lambda saved: saved.update(fresh=[(7, 0)]),
        lambda saved: saved.update(queued=[]),
        lambda saved: saved.update(rng={"bit_generator": "MT19937"}),
    ],
)
def test_what_a_replay_did_not_save_only_warns(tmp_path, change):
    replay, writer = make_replay(), EpisodeWriter(tmp_path, 1, 1000)
    play(replay, writer, 0, [10, 10])
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    change(saved)
    again, warnings = make_replay(), []
    again.restore(saved, episode_files(tmp_path), warnings.append)
    assert len(warnings) == 1 and warnings[0].endswith("its latent states start anew") and len(again) == 20
    again.sample(2)


# ---------------------------------------------------------------------------
# Memory


def grouped(tmp_path, monkeypatch, mine, files):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "mine").write_text(mine)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MINE", tmp_path / "mine")
    return memory.memory_limit()


GROUPS = {  # what a process is in, what stands there, and the limit in MiB
    "none": ("", {}, None),
    "docker, version 2": ("0::/\n", {"memory.max": "64"}, 64),
    "no limit": ("0::/\n", {"memory.max": "max", "memory.high": "max"}, None),
    "slowed down": ("0::/\n", {"memory.max": "64", "memory.high": "48"}, 48),
    "above": ("0::/job/step/task\n", {"job/memory.max": "32", "job/step/task/memory.max": "max"}, 32),
    "below": ("0::/job/step\n", {"job/memory.max": "32", "job/step/memory.max": "16", "memory.max": "99"}, 16),
    "of a neighbour": ("0::/job/mine\n", {"job/other/memory.max": "8"}, None),
    "version 1": ("4:memory:/slurm/job\n3:cpu:/\n", {"memory/slurm/job/memory.limit_in_bytes": "40"}, 40),
    "docker, version 1": ("4:memory:/docker/0123\n0::/\n", {"memory/memory.limit_in_bytes": "24"}, 24),
    "version 1 without": ("4:memory:/\n", {"memory/memory.limit_in_bytes": "8796093022207"}, None),
    "nonsense": ("memory\n::\n0::/\n", {"memory.max": "much"}, None),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_least_of_the_machine_and_of_all_groups_is_the_limit(tmp_path, monkeypatch, kind):
    mine, files, limit = GROUPS[kind]
    files = {name: str(int(text) * 2**20) if text.isdigit() else text for name, text in files.items()}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert grouped(tmp_path, monkeypatch, mine, files) == (limit * 2**20 if limit else machine)


def test_a_replay_says_what_it_will_take_and_whether_that_is_much(tmp_path, monkeypatch):
    size = memory.step_bytes(LAYOUT)
    grouped(tmp_path, monkeypatch, "0::/", {"memory.max": str(1000 * size)})
    replay = make_replay(stored={}, capacity=800)
    assert replay.memory == (800, 800 * size, 1000 * size) and replay.tight is None
    assert str(replay.memory) == f"800 steps of {size / 1024:.1f} KB, 1 MiB of memory"
    tight = make_replay(stored={}, capacity=900).tight
    assert "the replay will grow to 900 steps" in tight and "--dataset_size 800" in tight and "\n" not in tight
    error = one_line_error(lambda: make_replay(stored={}, capacity=1001))
    assert "do not fit into 1 MiB of memory: lower --dataset_size to at most 800" in error


def test_where_the_memory_is_not_known_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.os, "sysconf_names", {})  # as on Windows
    assert grouped(tmp_path, monkeypatch, "", {}) == float("inf")
    assert make_replay(capacity=10**5).tight is None
