"""What goes to the device in one transfer."""

import numpy as np
import pytest
import torch

from replay import rings
from replay.rings import upload
from tests.test_replay import LATENT, LAYOUT, latent_of, make_episode, make_replay, steps_of


def test_arrays_of_all_types_arrive_as_they_are():
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (3, 5, 7), np.uint8),
        rng.random((3, 2)).astype(np.float32)[:, ::-1],  # not contiguous
        rng.random(3) < 0.5,
        rng.random((3, 4)).astype(np.float16),
        np.zeros((3, 0), np.float32),
        rng.integers(-9, 9, (3, 2)).astype(np.int16),
        np.arange(3),
    ]
    for array, tensor in zip(arrays, upload(arrays, torch.device("cpu")), strict=True):
        assert tensor.dtype == torch.from_numpy(array.copy()).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("packed", [1, 300, 2**26])  # bytes: a step, some, all at once
def test_new_steps_are_pushed_in_few_transfers(packed, monkeypatch):
    replay = make_replay(streams=3, capacity=60, device=torch.device("cpu"))
    sent, step = [], sum(value[0].nbytes for value in replay.streams[0].data.values())
    monkeypatch.setattr(rings, "PACKED", packed)
    monkeypatch.setattr(rings, "upload", lambda arrays, device: sent.append(len(arrays[0])) or upload(arrays, device))
    for count in (7, 20, 9):
        for index in range(3):
            for one in steps_of(make_episode(100 * index, count + index)):
                replay.add(index, one, latent_of(int(one["reward"])))
        sent.clear()
        replay.mirror.push()
        new = sum(min(count + index, 20) for index in range(3))  # a ring has room for 20
        assert sum(sent) == new
        assert all(size <= max(1, packed // step) for size in sent)
        assert len(sent) == 1 or packed < 2**26
        for stream, ring in zip(replay.streams, replay.mirror.rings, strict=True):
            for key in LAYOUT | LATENT:
                np.testing.assert_array_equal(ring[key].numpy(), stream.data[key])
        sent.clear()
        replay.mirror.push()
        assert sent == []


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_where_windows_overlap_the_last_one_is_kept(device):
    replay = make_replay(streams=2, capacity=40, device=device)
    for index in range(2):
        for one in steps_of(make_episode(0, 30)):  # the rings have wrapped
            replay.add(index, one, latent_of(int(one["reward"])))
    replay.sample(1)
    places = [(0, 20), (1, 12), (0, 22), (0, 21), (1, 12)]
    values = torch.arange(5.0)[:, None, None] + torch.arange(4.0)[None, :, None] / 4
    replay.refresh(places, {"deter": values.expand(5, 4, 4), "stoch": values.expand(5, 4, 4)[..., :2].long()})
    expected = {(0, 21): 0.0}  # that of the first window alone; the others are those of the last that has the step
    for row, (index, position) in enumerate(places):
        expected |= {(index, position + 1 + t): row + t / 4 for t in range(4)}
    replay.state_dict()  # which pulls what is on the device
    for (index, position), value in expected.items():
        assert (replay.streams[index].data["deter"][position % 20] == value).all()
        assert (replay.streams[index].data["stoch"][position % 20] == int(value)).all()
