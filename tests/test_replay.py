"""Episode files and the replay, on steps whose entries all identify the step."""

import contextlib
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from modalities.audio.space import Converter as Sound
from replay import npz
from replay.episodes import EpisodeWriter, episode_files, load_episode, save_episode
from replay.sampling import Replay, resident, room_for_run
from specs import act_spec, step_layout
from tools import UserError

LAYOUT = {
    "image": ((2, 2, 1), np.uint8),
    "state": ((3,), np.float32),
    "action": ((2,), np.float32),
    "reward": ((), np.float32),
    "is_first": ((), bool),
    "is_last": ((), bool),
    "is_terminal": ((), bool),
}
LATENT = {"deter": ((4,), np.float16), "stoch": ((2,), np.uint8)}  # stoch: two groups of eight classes


def make_episode(start, length, terminal=False):
    """Return steps whose reward is start, start + 1, ...; the other keys are functions of it."""
    number = np.arange(start, start + length)
    return {
        "image": np.broadcast_to((number % 256).astype(np.uint8)[:, None, None, None], (length, 2, 2, 1)),
        "state": np.stack([number, -number, number / 2], 1).astype(np.float32),
        "action": np.eye(2, dtype=np.float32)[number % 2],
        "reward": number.astype(np.float32),
        "is_first": np.arange(length) == 0,
        "is_last": np.arange(length) == length - 1,
        "is_terminal": (np.arange(length) == length - 1) & terminal,
    }


def steps_of(episode):
    return [{key: value[t] for key, value in episode.items()} for t in range(len(episode["reward"]))]


def latent_of(number):
    """Return the latent state stored with step `number`."""
    return {"deter": np.full(4, number / 4, np.float32), "stoch": np.array([number % 8, (number + 1) % 8])}


def make_replay(episodes=(), streams=1, capacity=100, layout=LAYOUT, stored=LATENT, **options):
    """Return a replay of windows of 1 + 4 steps with episodes added step by step, alternating between streams."""
    options = {"length": 4, "context": 1 if stored else 0, **options}
    replay = Replay(layout, stored, streams=streams, capacity=capacity, **options)
    for number, episode in enumerate(episodes):
        for step in steps_of(episode):
            replay.add(number % streams, step, latent_of(int(step["reward"])))
    return replay


def windows(replay, count, **options):
    """Sample `count` windows; return lists of step numbers."""
    batch, places = replay.sample(count, **options)
    assert len(places) == count
    return [row.astype(int).tolist() for row in batch["reward"]]


# ---------------------------------------------------------------------------
# Sampling


def test_windows_are_a_context_step_and_consecutive_steps_across_episode_ends():
    replay = make_replay([make_episode(0, 7), make_episode(7, 5, terminal=True), make_episode(12, 8)])
    batch, places = replay.sample(64, fresh=False)
    number = batch["reward"]
    assert number.shape == (64, 5)  # one step of context and four that are trained
    np.testing.assert_array_equal(number, number[:, :1] + np.arange(5))
    assert [int(first) for first in number[:, 0]] == [position for _, position in places]
    expected = {key: np.stack([make_episode(int(n), 1)[key][0] for n in number.ravel()]) for key in ("state", "action")}
    for key, value in expected.items():
        np.testing.assert_array_equal(batch[key].reshape(value.shape), value)
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], number)
    np.testing.assert_array_equal(batch["is_first"], np.isin(number, [0, 7, 12]))
    np.testing.assert_array_equal(batch["is_last"], np.isin(number, [6, 11, 19]))
    np.testing.assert_array_equal(batch["is_terminal"], number == 11)
    assert {key: value.dtype for key, value in batch.items()} == {
        **{key: np.dtype(dtype) for key, (_, dtype) in LAYOUT.items()},
        "deter": np.dtype(np.float16),
        "stoch": np.dtype(np.uint8),
    }


def test_every_window_is_equally_likely():
    replay = make_replay([make_episode(0, 25), make_episode(100, 9)], streams=2)
    replay.fresh.clear()
    starts = [window[0] for _ in range(30) for window in windows(replay, 100)]
    valid = [*range(21), *range(100, 105)]  # 25 - 4 windows of one stream and 9 - 4 of the other, none across them
    counts = np.array([starts.count(start) for start in valid])
    assert counts.sum() == 3000
    expected = 3000 / len(valid)
    assert ((counts - expected) ** 2 / expected).sum() < 52.6  # chi-square with 25 degrees of freedom, p = 0.001


def test_a_window_needs_a_step_of_context():
    replay = make_replay([make_episode(0, 4)])
    assert not replay.ready() and len(replay) == 4
    replay.add(0, steps_of(make_episode(4, 1))[0])
    assert replay.ready() and windows(replay, 2) == [[0, 1, 2, 3, 4]] * 2


def test_the_ring_forgets_the_oldest_and_holds_exactly_its_capacity():
    replay = make_replay([make_episode(0, 9), make_episode(9, 9), make_episode(18, 9)], capacity=10)
    assert len(replay) == 10
    seen = windows(replay, 300, fresh=False)
    assert sorted({window[0] for window in seen}) == [17, 18, 19, 20, 21, 22]
    assert all(window == list(range(window[0], window[0] + 5)) for window in seen)  # also where the ring wraps


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_the_capacity_is_what_was_asked_for_over_all_streams(streams):
    replay = make_replay([make_episode(100 * n, 60) for n in range(streams)], streams=streams, capacity=50)
    assert len(replay) == 50


def test_an_episode_longer_than_the_ring_leaves_its_end():
    replay = make_replay(capacity=10)
    replay.extend(0, "name", make_episode(0, 25))
    assert sorted({window[0] for window in windows(replay, 200)}) == [15, 16, 17, 18, 19, 20]


def test_fresh_windows_come_first_once_and_without_overlap():
    replay = make_replay([make_episode(0, 13), make_episode(100, 11)], streams=2)
    first = windows(replay, 2) + windows(replay, 2)
    assert first == [[*range(5)], [*range(5, 10)], [*range(100, 105)], [*range(105, 110)]]
    assert not replay.fresh
    for step in steps_of(make_episode(13, 2)):
        assert not replay.fresh  # steps 10, 11 and 12 wait for two more
        replay.add(0, step)
    seen = windows(replay, 50)
    assert seen[0] == [10, 11, 12, 13, 14]
    assert len({tuple(window) for window in seen[1:]}) > 5  # the rest of the batch is drawn


def test_fresh_windows_can_be_left_in_their_queue_and_may_be_overwritten_there():
    replay = make_replay([make_episode(0, 22)], capacity=10)
    assert len(windows(replay, 3, fresh=False)) == 3
    assert len(replay.fresh) == 4
    assert windows(replay, 1) == [[15, 16, 17, 18, 19]]  # of 0, 5, 10 and 15 only the last is still complete


def test_the_seed_decides_the_sampling():
    def draw(seed):
        return windows(make_replay([make_episode(0, 60)], seed=seed), 40, fresh=False)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


# ---------------------------------------------------------------------------
# Latents


def test_latents_stand_beside_their_steps():
    replay = make_replay([make_episode(0, 12), make_episode(12, 12)], capacity=16)
    batch, _ = replay.sample(50, fresh=False)
    for name in LATENT:
        expected = np.array([[latent_of(int(n))[name] for n in row[:1]] for row in batch["reward"]])  # of the context
        np.testing.assert_array_equal(batch[name], expected)


def test_refreshed_latents_replace_those_of_the_trained_steps():
    replay = make_replay([make_episode(0, 24)], capacity=16)  # in memory: 8...23; the ring ends after step 15
    places = [(0, 13), (0, 19)]
    deter = np.arange(32, dtype=np.float16).reshape(2, 4, 4)
    stoch = np.arange(16).reshape(2, 4, 2) % 8
    replay.refresh(places, {"deter": torch.from_numpy(deter), "stoch": torch.from_numpy(stoch)})
    held = {int(n): i for i, n in enumerate(replay.streams[0].data["reward"])}
    for row, (_, position) in enumerate(places):
        for t in range(4):
            index = held[position + 1 + t]
            np.testing.assert_array_equal(replay.streams[0].data["deter"][index], deter[row, t])
            np.testing.assert_array_equal(replay.streams[0].data["stoch"][index], stoch[row, t])
    for number in (8, 12, 13, 18, 19):  # context steps and others are unchanged
        np.testing.assert_array_equal(replay.streams[0].data["deter"][held[number]], latent_of(number)["deter"])


def test_a_step_without_a_latent_has_zeros_even_where_the_ring_held_another():
    replay = make_replay([make_episode(0, 10)], capacity=10)
    replay.add(0, steps_of(make_episode(10, 1))[0])
    replay.extend(0, "name", make_episode(11, 1))
    for key in ("deter", "stoch"):
        value = replay.streams[0].data[key]
        assert not value[:2].any() and value[2:].any(1).all()


def test_more_than_256_classes_need_a_wider_type():
    replay = make_replay([make_episode(0, 6)], stored=LATENT | {"stoch": ((2,), np.int16)})
    replay.refresh([(0, 0)], {"deter": torch.zeros(1, 4, 4), "stoch": torch.full((1, 4, 2), 299)})
    assert replay.streams[0].data["stoch"].max() == 299


@pytest.mark.parametrize("stored", [LATENT, {}])
@pytest.mark.parametrize("streams, capacity", [(1, 300), (1, 33), (2, 51)])
def test_a_copy_on_the_device_gives_what_the_host_gives(streams, capacity, stored):
    """The device is the CPU here: a GPU runs the same code."""
    devices = None, torch.device("cpu")
    pair = [make_replay(streams=streams, capacity=capacity, stored=stored, device=device) for device in devices]
    rng = np.random.default_rng(0)
    count = [0] * streams
    for turn in range(120):
        index = turn % streams
        start, length, closes = 1000 * index + count[index], int(rng.integers(1, 7)), rng.random() < 0.3
        count[index] += length
        for replay in pair:
            for step in steps_of(make_episode(start, length)):
                replay.add(index, {**step, "is_last": False}, latent_of(int(step["reward"])) if stored else None)
            early = rng.random() < 0.5  # the end of an episode may be known before its last step was copied, or after
            if replay.mirror and not early:
                replay.mirror.push()
            if closes:
                replay.close_episode(index, str(turn), length)
        if not pair[0].ready():
            continue
        (one, places), (other, others) = (replay.sample(6) for replay in pair)
        assert places == others and one.keys() == other.keys()
        for key, value in one.items():
            assert other[key].dtype == torch.from_numpy(value).dtype
            np.testing.assert_array_equal(value, other[key].numpy(), err_msg=key)
        if stored:
            deter, stoch = torch.from_numpy(rng.random((6, 4, 4))), torch.from_numpy(rng.integers(8, size=(6, 4, 2)))
            for replay in pair:
                replay.refresh(places, {"deter": deter.half(), "stoch": stoch})
    one, other = (replay.state_dict() for replay in pair)
    for stream, copied in zip(one["streams"], other["streams"], strict=True):
        assert stream.keys() == copied.keys() and stream["episodes"] == copied["episodes"]
        for key in stored:
            assert torch.equal(stream[key], copied[key])


@pytest.mark.parametrize("windows", ["fresh", "episode"])
def test_a_batch_that_is_taken_early_is_the_one_that_would_have_come(windows):
    """Whatever comes between: steps, the end of an episode, another size, a save. The device is the CPU here."""
    options = {"streams": 2, "capacity": 90, "windows": windows}
    pair = [make_replay(ahead=device, **options) for device in (None, torch.device("cpu"))]
    rng, early, in_vain = np.random.default_rng(0), 0, 0
    for turn in range(150):
        for replay in pair:
            for step in steps_of(make_episode(7 * turn, 7)):
                replay.add(turn % 2, {**step, "is_last": False}, latent_of(int(step["reward"])))
            if turn % 3:
                replay.close_episode(turn % 2, str(turn), 7)
        if not pair[0].ready():
            continue
        for number in range(3 if turn % 10 else 1):  # most bursts are as long as the last
            early += pair[1].ahead.batch is not None
            size, kind = (6, {}) if rng.random() < 0.9 else (4, {"fresh": False})
            (one, places), (other, others) = (replay.sample(size, **kind) for replay in pair)
            assert places == others and one.keys() == other.keys()
            for key, value in one.items():
                np.testing.assert_array_equal(value, np.asarray(other[key]), err_msg=f"{turn} {number} {key}")
            latents = {"deter": torch.from_numpy(rng.random((size, 4, 4))), "stoch": torch.zeros(size, 4, 2)}
            for replay in pair:
                replay.refresh(places, latents)
        in_vain += pair[1].ahead.batch is not None
        if turn % 4 == 0:
            one, other = (replay.state_dict() for replay in pair)
            assert one["rng"] == other["rng"] and one["fresh"] == other["fresh"] and one["queued"] == other["queued"]
    assert early > 200 and 0 < in_vain < 30


def test_a_batch_is_taken_early_on_a_stream_of_its_own(monkeypatch):
    """torch.cuda is a stand-in that notes what is asked of streams, as there is no GPU."""
    notes, now = [], SimpleNamespace(wait_stream=lambda other: notes.append("main waits for the copies"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: notes.append(f"on {stream}") or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: notes.append(stream))
    monkeypatch.setattr("replay.ahead.upload", lambda arrays, device: list(map(torch.from_numpy, arrays)))
    replay = make_replay([make_episode(0, 60)], ahead=torch.device("cuda", 1))
    for _ in range(2):
        replay.sample(3)
    replay.look_ahead(3)
    assert not notes  # nothing is known yet of how long bursts are
    replay.add(0, steps_of(make_episode(60, 1))[0], latent_of(60))
    replay.sample(3)
    replay.look_ahead(3)
    assert notes == ["on copies"]
    replay.sample(3)
    replay.look_ahead(3)
    assert notes == ["on copies", "main waits for the copies", *[now] * len(LAYOUT)]


def test_only_what_fits_is_copied_to_a_gpu(monkeypatch):
    step = 2 * 2 + 4 * (3 + 2 + 1) + 3 + 4 * 2 + 2  # bytes: image, numbers, flags, deter, stoch
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000 * step, 10**12))  # no GPU here
    gpu = torch.device("cuda")
    assert resident(gpu, LAYOUT | LATENT, 1000) == gpu
    assert resident(gpu, LAYOUT | LATENT, 1001) is None
    assert resident(torch.device("cpu"), LAYOUT | LATENT, 10) is None


# ---------------------------------------------------------------------------
# Episode files


def test_an_episode_file_round_trips(tmp_path):
    path = save_episode(tmp_path, make_episode(3, 200))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no temporary file is left
    assert re.fullmatch(r"\d{8}T\d{6}F\d{6}-[0-9a-f]{32}-200\.npz", path.name)
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == sorted(LAYOUT)
    assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in zipfile.ZipFile(path).infolist())
    episode = load_episode(path, LAYOUT)
    for key, value in make_episode(3, 200).items():
        assert episode[key].dtype == LAYOUT[key][1]
        np.testing.assert_array_equal(episode[key], value)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "write", lambda file, arrays: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_episode(tmp_path, make_episode(0, 5))
    assert not list(tmp_path.iterdir())


IMAGE_LAYOUT = {key: value for key, value in LAYOUT.items() if key != "state"}


def test_files_of_dreamerv3_torch_load_as_they_are(tmp_path):
    episode = make_episode(0, 6)
    theirs = {
        "image": episode["image"],
        "reward": episode["reward"],
        "discount": np.array([1, 1, 1, 1, 1, 0], np.float32),
        "logprob": np.zeros(6, np.float32),
        "is_first": episode["is_first"],
        "is_terminal": np.array([0, 0, 0, 0, 0, 1], bool),
        "action": episode["action"],
    }
    np.savez_compressed(tmp_path / "20230101T000000-0123456789abcdef-6.npz", **theirs)
    loaded = load_episode(next(tmp_path.iterdir()), IMAGE_LAYOUT)
    assert loaded.keys() == IMAGE_LAYOUT.keys()
    for key in loaded.keys() & theirs.keys():
        np.testing.assert_array_equal(loaded[key], theirs[key])
    assert loaded["is_last"].tolist() == [False] * 5 + [True]


def test_files_of_dreamerv2_load_as_they_are(tmp_path):
    theirs = make_episode(0, 6) | {"reward": np.arange(6, dtype=np.float16)[:, None]}
    flags = {key: theirs.pop(key) for key in ("is_first", "is_last", "is_terminal")}
    for name, arrays in {"with": theirs | flags, "without": theirs}.items():
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
        loaded = load_episode(tmp_path / f"{name}.npz", LAYOUT)
        for key, value in make_episode(0, 6).items():
            assert loaded[key].dtype == LAYOUT[key][1]
            np.testing.assert_array_equal(loaded[key], value)


def test_an_episode_that_was_cut_short_ends_with_its_file(tmp_path):
    path = save_episode(tmp_path, make_episode(0, 5) | {"is_last": np.zeros(5, bool)})
    episode = load_episode(path, LAYOUT)
    assert episode["is_last"].tolist() == [False] * 4 + [True] and not episode["is_terminal"].any()


def truncated(path):
    content = save_episode(path.parent, make_episode(0, 50))
    path.write_bytes(content.read_bytes()[:400])
    content.unlink()


def changed(**arrays):
    return lambda path: np.savez_compressed(path, **{**make_episode(0, 9), **arrays})


def without(key):
    return lambda path: np.savez_compressed(path, **{k: v for k, v in make_episode(0, 9).items() if k != key})


def damaged(path):
    """Return an uncompressed file with noise in the middle, which its checksum reveals."""
    np.savez(path, **make_episode(0, 9))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"?" * 40
    path.write_bytes(content)


def bare_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


BAD_FILES = {
    "truncated": (truncated, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("not an archive\nof arrays\n"), "cannot be read"),
    "damaged": (damaged, "cannot be read"),
    "array": (bare_array, "cannot be read"),
    "directory": (lambda path: path.mkdir(), "cannot be read"),
    "pickles": (changed(action=np.array([{"a": 1}] * 9)), "cannot be read"),
    "no reward": (without("reward"), "holds no reward"),
    "empty reward": (changed(reward=np.zeros(0)), "holds no reward"),
    "no action": (without("action"), "lacks action"),
    "shape": (changed(state=np.zeros((9, 4), np.float32)), r"state has shape (9, 4) where (9, 3) was expected"),
    "length": (changed(state=np.zeros((8, 3), np.float32)), r"state has shape (8, 3) where (9, 3) was expected"),
    "no length": (changed(action=np.float32(0)), "action has shape ()"),
    "text array": (changed(action=np.array([["a", "b"]] * 9)), "action has type <U1"),
    "channels first": (changed(image=np.zeros((9, 1, 2, 2), np.uint8)), "image has shape (9, 1, 2, 2)"),
    "not finite": (changed(reward=np.array([0.0] * 8 + [np.nan])), "reward is not finite"),
    "too large": (changed(state=np.full((9, 3), 1e300)), "state is not finite"),
    "float image": (changed(image=np.zeros((9, 2, 2, 1), np.float32)), "image has type float32"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_in_one_warning_and_skipped(tmp_path, kind):
    make, reason = BAD_FILES[kind]
    good = save_episode(tmp_path, make_episode(0, 20))
    bad = tmp_path / "20230101T000000-foreign-9.npz"
    make(bad)
    replay, warnings = make_replay(), []
    replay.restore(None, [bad, good], warnings.append)
    assert len(warnings) == 1
    assert str(bad) in warnings[0] and reason in warnings[0] and "\n" not in warnings[0]
    assert len(replay) == 20


def test_the_directory_is_bounded_in_steps(tmp_path):
    writer = EpisodeWriter(tmp_path, 1, 25)
    names = []
    for number in range(5):
        files = [writer.add(0, step) for step in steps_of(make_episode(10 * number, 10))]
        assert files[:-1] == [None] * 9 and files[-1][1] == 10
        names.append(files[-1][0])
    assert [path.name for path in episode_files(tmp_path)] == names[-2:]
    again = EpisodeWriter(tmp_path, 1, 25)  # counts existing files and continues
    assert again.total == 20
    for step in steps_of(make_episode(50, 15)):
        file = again.add(0, step)
    assert [path.name for path in episode_files(tmp_path)] == [names[-1], file[0]]


def test_environments_write_episodes_of_their_own_and_partial_ones_when_asked(tmp_path):
    writer = EpisodeWriter(tmp_path, 2, 1000)
    first, second = steps_of(make_episode(0, 4)), steps_of(make_episode(100, 8))
    for t in range(4):
        writer.add(0, first[t])
        writer.add(1, second[t])
    assert writer.flush(0) is None  # it is complete, and written
    assert writer.flush(1)[1] == 4
    rewards = sorted(load_episode(path, LAYOUT)["reward"].tolist() for path in episode_files(tmp_path))
    assert rewards == [[0, 1, 2, 3], [100, 101, 102, 103]]


# ---------------------------------------------------------------------------
# Going on after an interruption


def play(replay, writer, start, lengths, unfinished=0):
    """Add episodes to the streams in turns as a run does, and the first steps of one that goes on."""
    for number, length in enumerate(lengths):
        index = number % len(replay.streams)
        for step in steps_of(make_episode(start, length)):
            replay.add(index, step, latent_of(int(step["reward"])))
            file = writer.add(index, step)
        replay.streams[index].close_episode(*file)
        start += length
    for step in steps_of(make_episode(start, unfinished + 1))[:-1]:
        replay.add(0, step, latent_of(int(step["reward"])))
        writer.add(0, step)
    return start


def saved_and_loaded(replay, path):
    torch.save(replay.state_dict(), path)
    return torch.load(path, weights_only=True)


def no_warning(text):
    raise AssertionError(text)


@pytest.mark.parametrize("streams, capacity", [(1, 200), (2, 200), (1, 40)])
def test_a_restored_replay_samples_what_the_saved_one_would_have(tmp_path, streams, capacity):
    replay, writer = make_replay(streams=streams, capacity=capacity), EpisodeWriter(tmp_path, streams, 1000)
    play(replay, writer, 0, [9, 12, 7, 20])
    replay.sample(3)
    replay.refresh([(0, 18)], {"deter": torch.full((1, 4, 4), 7.5), "stoch": torch.full((1, 4, 2), 5)})
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    again = make_replay(streams=streams, capacity=capacity, seed=99)
    again.restore(saved, episode_files(tmp_path), no_warning)
    assert len(again) == len(replay) == min(48, capacity)
    for _ in range(4):  # first the fresh windows that were waiting, then drawn ones
        (one, places), (other, others) = replay.sample(8), again.sample(8)
        assert places == others
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_a_kill_loses_the_unfinished_episode_and_nothing_else(tmp_path):
    replay, writer = make_replay(capacity=30), EpisodeWriter(tmp_path, 1, 1000)
    play(replay, writer, 0, [10, 10, 10], unfinished=6)  # it overwrites steps 0...5, which are in a file still
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    again = make_replay(capacity=30)
    again.restore(saved, episode_files(tmp_path), no_warning)
    data = again.streams[0].data
    assert sorted(data["reward"].astype(int)) == [*range(30)]
    for number, deter in zip(data["reward"].astype(int), data["deter"], strict=True):
        np.testing.assert_array_equal(deter, latent_of(number)["deter"] * (number >= 6))  # no step has another's latent
    play(again, writer, 100, [8])
    assert max(window[-1] for window in windows(again, 100, fresh=False)) == 107


@pytest.mark.parametrize("streams, lengths", [(1, []), (2, []), (2, [10])])
def test_a_kill_before_an_episode_ended_leaves_nothing_to_restore_in_its_stream(tmp_path, streams, lengths):
    replay, writer = make_replay(streams=streams), EpisodeWriter(tmp_path, streams, 1000)
    play(replay, writer, 0, lengths, unfinished=6)
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    again = make_replay(streams=streams)
    again.restore(saved, episode_files(tmp_path), no_warning)
    assert len(again) == sum(lengths)


def test_a_single_step_that_a_worker_left_behind_is_its_episodes_last():
    replay = make_replay()
    for step in [steps_of(make_episode(0, 5))[0], *steps_of(make_episode(10, 5))[:3]]:
        replay.add(0, step, latent_of(0))
    assert replay.streams[0].data["is_last"][:4].tolist() == [True, False, False, False]


def test_files_newer_than_the_checkpoint_follow_with_latents_of_zero(tmp_path):
    replay, writer = make_replay(), EpisodeWriter(tmp_path, 1, 1000)
    start = play(replay, writer, 0, [10, 10])
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    play(replay, writer, start, [10])
    again = make_replay()
    again.restore(saved, episode_files(tmp_path), no_warning)
    stream = again.streams[0]
    np.testing.assert_array_equal(stream.data["reward"][:30], np.arange(30))
    assert stream.data["deter"][1:20].any(1).all() and not stream.data["deter"][20:30].any()


def test_a_file_that_is_gone_is_left_out(tmp_path):
    replay, writer = make_replay(), EpisodeWriter(tmp_path, 1, 1000)
    play(replay, writer, 0, [10, 10, 10])
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    episode_files(tmp_path)[1].unlink()
    again, warnings = make_replay(), []
    again.restore(saved, episode_files(tmp_path), warnings.append)
    assert warnings == ["1 of the replay's episode files are not there any more"]
    batch, _ = again.sample(40)
    assert len(again) == 20 and not np.isin(batch["reward"], np.arange(10, 20)).any()
    np.testing.assert_array_equal(batch["deter"][..., 0], batch["reward"][:, :1] / 4)


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_another_number_of_environments_keeps_all_steps(tmp_path, streams):
    replay, writer = make_replay(streams=3), EpisodeWriter(tmp_path, 3, 1000)
    play(replay, writer, 0, [10] * 6)
    saved = saved_and_loaded(replay, tmp_path / "replay.pt")
    again = make_replay(streams=streams)
    again.restore(saved, episode_files(tmp_path), no_warning)
    assert len(again) == 60
    steps = [stream.data["reward"][: len(stream)] for stream in again.streams]
    np.testing.assert_array_equal(np.sort(np.concatenate(steps)), np.arange(60))


def test_more_environments_share_the_steps_of_one(tmp_path):
    replay, writer = make_replay(capacity=80), EpisodeWriter(tmp_path, 1, 1000)
    play(replay, writer, 0, [10] * 6)
    again = make_replay(streams=4, capacity=80)  # 20 steps each
    again.restore(saved_and_loaded(replay, tmp_path / "replay.pt"), episode_files(tmp_path), no_warning)
    assert sorted(len(stream) for stream in again.streams) == [10, 10, 20, 20]


def test_the_newest_files_are_loaded_when_there_are_too_many(tmp_path):
    writer = EpisodeWriter(tmp_path, 1, 1000)
    play(make_replay(), writer, 0, [10] * 6)
    replay = make_replay(capacity=20)
    replay.restore(None, episode_files(tmp_path), no_warning)
    np.testing.assert_array_equal(np.sort(replay.streams[0].data["reward"]), np.arange(40, 60))
    assert not replay.fresh  # what was seen before is not fresh


# ---------------------------------------------------------------------------
# Mistakes of the user


def test_what_does_not_fit_into_memory_is_refused_with_a_size_that_does():
    frames = {**LAYOUT, "image": ((64, 64, 3), np.uint8)}
    with pytest.raises(UserError, match=r"do not fit into .*: lower --dataset_size to at most \d+$") as caught:
        make_replay(layout=frames, capacity=10**12)
    assert "\n" not in str(caught.value)


CONTENT = {  # what a file holds: what is said of it
    "actions beyond the bounds": ({"move": np.full((9, 1), 2.0)}, "move reaches 2: actions must be scaled to [-1, 1]"),
    "soft actions": ({"action": np.full((9, 2), 0.5)}, "action holds what is no one-hot of 2 numbers"),
    "actions of -1 and 1": ({"action": np.tile([-1.0, 1.0], (9, 1))}, "action holds what is no one-hot"),
    "two actions at once": ({"action": np.ones((9, 2))}, "action holds what is no one-hot"),
    "no class": ({"phase": np.full(9, 3)}, "phase holds 3, which is no class of [3]"),
}
STEPS = step_layout(
    {"phase": Discrete(3), "cards": MultiDiscrete([2, 4])}, act_spec({"action": Discrete(2), "move": Box(-1, 1, (1,))})
)
GOOD = {
    "phase": np.full(9, 2),
    "cards": np.tile([1, 3], (9, 1)),
    "action": np.eye(2)[[0, 1] * 4 + [0]] * (np.arange(9) > 0)[:, None],
    "move": np.linspace(-1, 1, 9)[:, None],
    "reward": np.zeros(9),
}


@pytest.mark.parametrize("name", CONTENT)
def test_classes_and_actions_that_there_are_not_are_refused(tmp_path, name):
    changes, words = CONTENT[name]
    path = tmp_path / "20230101T000000-foreign-9.npz"
    np.savez(path, **GOOD)
    assert load_episode(path, STEPS)["cards"].tolist() == [[1, 3]] * 9
    np.savez(path, **{**GOOD, **changes})
    with pytest.raises(ValueError, match=re.escape(words)):
        load_episode(path, STEPS)


def test_samples_beyond_the_bounds_are_taken_from_own_files(tmp_path):
    path = save_episode(tmp_path, {**GOOD, "move": np.full((9, 1), 2.7)})
    assert load_episode(path, STEPS)["move"].max() == pytest.approx(2.7)


@pytest.mark.parametrize("own", [Box(0, 255, (4,), np.uint8), Box(-1, 1, (4,))], ids=["bytes", "numbers"])
def test_a_sound_in_a_file_is_what_its_type_says_whatever_the_environment_gives(tmp_path, own):
    layout = step_layout({"mic": Sound(own).space}, act_spec({"move": Box(-1, 1, (1,))}))
    half = 192 if own.dtype == np.uint8 else 0.5
    for number, value in enumerate([np.uint8(192), np.int16(16384), np.int32(2**30), np.float32(0.5), np.float64(0.5)]):
        for shape in ((9, 4), (9, 4, 1)):
            np.savez(tmp_path / f"{number}.npz", mic=np.full(shape, value), move=GOOD["move"], reward=GOOD["reward"])
            mic = load_episode(tmp_path / f"{number}.npz", layout)["mic"]
            assert mic.shape == (9, 4, 1) and mic.dtype == own.dtype and (mic == half).all()
    np.savez(tmp_path / "loud.npz", mic=np.full((9, 4), 1.5), move=GOOD["move"], reward=GOOD["reward"])
    assert (load_episode(tmp_path / "loud.npz", layout)["mic"] == (255 if half == 192 else 1.5)).all()
    np.savez(tmp_path / "bits.npz", mic=np.ones((9, 4), bool), move=GOOD["move"], reward=GOOD["reward"])
    if half == 192:
        with pytest.raises(ValueError, match="mic has type bool where uint8 was expected"):
            load_episode(tmp_path / "bits.npz", layout)


@pytest.mark.parametrize("phase", [[0.5] * 9, [-1] * 9])
def test_what_is_no_class_is_refused_and_a_file_begins_an_episode(tmp_path, phase):
    layout = {"phase": ((), np.int32), **dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), bool))}
    layout |= {"reward": ((), np.float32)}
    np.savez(tmp_path / "a.npz", reward=np.zeros(9), phase=np.array(phase))
    with pytest.raises(ValueError, match="phase holds what is no class"):
        load_episode(tmp_path / "a.npz", layout)
    np.savez(tmp_path / "b.npz", reward=np.zeros(9), phase=np.arange(9.0), is_first=np.zeros(9, bool))
    assert load_episode(tmp_path / "b.npz", layout)["is_first"].tolist() == [True] + [False] * 8


@pytest.mark.parametrize("width, steps", [(3, 2 * 510 + 12), (2000, 561 + 12)])
def test_a_run_has_room_for_the_first_steps_of_its_episodes(width, steps):
    # 500 + 10 actions: as many again where steps are small, a tenth more where they are large; two open windows
    config = SimpleNamespace(steps=1000, action_repeat=2, prefill=10, envs=2, batch_length=4)
    assert room_for_run(config, {"state": ((width,), np.float32)}) == steps


def test_a_capacity_below_one_window_is_refused():
    with pytest.raises(UserError, match="--dataset_size leaves 4 steps a stream, too few for windows of 5"):
        make_replay(streams=2, capacity=9)
