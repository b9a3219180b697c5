"""Images of every layout that people have, and what is no image."""

import functools
import pickle

import numpy as np
import pytest
from gymnasium import spaces

from modalities import describe, kind_of, obs_spec
from tests.factories import Toy, check_conformance, env_config, make_toy, one_line_error

U8, F32 = np.uint8, np.float32
MOVED = "channels first, moved"


def box(shape, high=255, dtype=U8, low=0):
    return spaces.Box(low, high, shape, dtype)


TAKEN = {  # name: (space, flags, what it is taken for)
    "rgb": (box((64, 64, 3)), {}, "image 64x64x3"),
    "gray": (box((64, 64)), {}, "image 64x64x1"),
    "gray, one channel": (box((96, 80, 1)), {}, "image 64x64x1 (resized from 96x80)"),
    "rgba": (box((64, 64, 4)), {}, "image 64x64x4"),
    "channels first": (box((3, 64, 64)), {}, f"image 64x64x3 ({MOVED})"),
    "stack first": (box((4, 84, 84)), {}, f"image 64x64x4 ({MOVED}; resized from 84x84)"),
    "one channel first": (box((1, 64, 64)), {}, f"image 64x64x1 ({MOVED})"),
    "two channels": (box((64, 64, 2)), {}, "image 64x64x2"),
    "twelve channels": (box((84, 84, 12)), {}, "image 64x64x12 (resized from 84x84)"),
    "twelve first": (box((12, 64, 64)), {}, f"image 64x64x12 ({MOVED})"),
    "stack of rgb": (box((4, 64, 64, 3)), {}, "image 64x64x12 (a stack in front, moved)"),
    "stack of rgb, first": (box((4, 3, 64, 64)), {}, "image 64x64x12 (a stack and channels first, moved)"),
    "stack behind": (box((64, 64, 3, 4)), {}, "image 64x64x12 (a stack behind the channels)"),
    "floats": (box((64, 64, 3), 1, F32), {}, "image 64x64x3 (0 to 1, scaled)"),
    "floats first": (box((3, 64, 64), 1, F32, -1), {}, f"image 64x64x3 ({MOVED}; -1 to 1, scaled)"),
    "floats to 255": (box((64, 64, 3), 255, F32), {}, "image 64x64x3"),
    "integers": (box((64, 64, 3), 255, np.int64), {}, "image 64x64x3"),
    "mask": (box((64, 64), 1), {}, "image 64x64x1 (0 to 1, scaled)"),
    "bool mask": (box((64, 64, 1), 1, bool), {}, "image 64x64x1 (0 to 1, scaled)"),
    "bits": (spaces.MultiBinary((64, 64)), {}, "image 64x64x1 (0 to 1, scaled)"),
    "depth": (box((64, 64, 1), 65535, np.uint16), {}, "image 64x64x1 (0 to 65535, scaled)"),
    "depth in meters": (box((64, 64, 1), 10, F32), {}, "image 64x64x1 (0 to 10, scaled)"),
    "digits": (box((1, 28, 28), 1, F32), {}, f"image 64x64x1 ({MOVED}; 0 to 1, scaled; resized from 28x28)"),
    "many channels, told": (box((24, 64, 64)), {"image_layout": "chw"}, f"image 64x64x24 ({MOVED})"),
    "many channels last, told": (box((64, 64, 20)), {"image_layout": "hwc"}, "image 64x64x20"),
    "small, not blown up": (box((8, 6, 3)), {"size": (4, 4)}, "image 4x4x3 (resized from 8x6)"),
    "frames": (box((64, 64, 3)), {"frame_stack": 2}, "image 64x64x6 (last 2)"),
    "symbols": (box((7, 7, 3)), {}, "147 numbers (7x7x3, no image)"),
    "board": (box((8, 8), 2), {}, "64 numbers (8x8, no image)"),
    "go": (box((3, 19, 19), 1, bool), {}, "1083 numbers (3x19x19, no image)"),
    "height": (box(()), {}, "1 number"),
    "window of features": (box((30, 20), np.inf, F32, -np.inf), {}, "600 numbers (30x20, no image)"),
    "vector": (box((4,), 1, F32), {}, "4 numbers"),
    "class": (spaces.Discrete(5), {}, "one of 5"),
    "classes": (spaces.MultiDiscrete([[2, 3]]), {}, "one of 2 and of 3"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_an_array_is_taken_for_is_decided_by_its_space_and_said(name):
    space, flags, about = TAKEN[name]
    env = make_toy(Toy(space), **flags)
    (key,) = env.obs_space
    assert describe(env.obs_space) == {key: about}
    assert describe(pickle.loads(pickle.dumps(env.obs_space))) == {key: about}  # as it comes from a worker
    kind = "image" if about.startswith("image") else "vector"
    assert (obs_spec(env.obs_space)[key].kind, key) == (kind, "image" if kind == "image" else "state")
    check_conformance(env, 14)


REFUSED = {
    "twenty channels": (box((64, 64, 20)), "64x64x20 has neither 1 to 12 channels, behind or before the sides"),
    "voxels": (box((32, 32, 32), 1, F32), "--image_layout hwc or chw"),
    "no bounds": (box((64, 64, 3), np.inf, F32, -np.inf), "its space must tell its bounds"),
    "a large number for none": (box((1, 64, 64), 3.4e38, F32, -3.4e38), "FlattenObservation"),
    "five axes": (box((2, 2, 3, 64, 64)), "give (H, W, C)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_like_an_image_and_is_none_is_one_line_not_thousands_of_numbers(name):
    space, words = REFUSED[name]
    assert words in one_line_error(make_toy, Toy(space))


def test_what_cannot_be_an_image_may_be_left_out():
    space = spaces.Dict({"depth": box((64, 64, 3), np.inf, F32, -np.inf), "state": box((2,), 1, F32)})
    env = make_toy(Toy(space), cnn_keys="")
    assert env.obs_space.keys() == {"state"} and "depth" not in env.reset()


def test_a_board_that_is_chosen_as_an_image_is_not_left_out_in_silence():
    space = spaces.Dict({"image": box((7, 7, 3)), "direction": spaces.Discrete(4)})
    message = one_line_error(functools.partial(make_toy, Toy(space), mlp_keys="direction"))
    assert "'image' (7, 7, 3) is too small for an image of (64, 64)" in message
    assert make_toy(Toy(space), mlp_keys="direction", cnn_keys="").obs_space.keys() == {"direction"}
    assert make_toy(Toy(space)).obs_space["image"].shape == (147,)


def test_axes_move_and_pixels_stay():
    image = np.random.default_rng(0).integers(0, 256, (64, 48, 3), U8)
    for axes, flags in (((0, 1, 2), {}), ((2, 0, 1), {})):
        given = image.transpose(axes)
        env = make_toy(Toy(box(given.shape), lambda step, given=given: given), size=(64, 48), **flags)
        np.testing.assert_array_equal(env.reset()["image"], image)
    stack = np.random.default_rng(1).integers(0, 256, (4, 64, 48, 3), U8)
    joined = np.concatenate(list(stack), -1)  # the oldest first, as frames are stacked here
    for axes in ((0, 1, 2, 3), (0, 3, 1, 2), (1, 2, 3, 0)):
        given = stack.transpose(axes)
        seen = make_toy(Toy(box(given.shape), lambda step, given=given: given), size=(64, 48)).reset()["image"]
        np.testing.assert_array_equal(seen, joined)


def test_channels_are_resized_apart():
    image = np.random.default_rng(0).integers(0, 256, (84, 84, 9), U8)
    nine = make_toy(Toy(box(image.shape), lambda step: image)).reset()["image"]
    for first in (0, 3, 6):
        part = np.ascontiguousarray(image[..., first : first + 3])
        three = make_toy(Toy(box(part.shape), lambda step, part=part: part)).reset()["image"]
        np.testing.assert_array_equal(nine[..., first : first + 3], three)


@pytest.mark.parametrize(
    "space, value, pixel",
    [
        (box((64, 64, 3), 1, F32), 0.5, 128),
        (box((64, 64, 3), 1, F32, -1), -1.0, 0),
        (box((64, 64, 3), 1, F32, -1), 1.0, 255),
        (box((64, 64), 1), 1, 255),
        (box((64, 64), 1, bool), True, 255),
        (box((64, 64, 1), 65535, np.uint16), 32896, 128),
        (box((64, 64, 1), 255, F32), 77.0, 77),
    ],
)
def test_values_are_scaled_from_the_bounds_of_their_space(space, value, pixel):
    env = make_toy(Toy(space, lambda step: np.full(space.shape, value, space.dtype)))
    assert set(env.reset()["image"].ravel().tolist()) == {pixel}


def test_bounds_may_differ_by_channel():
    high = np.ones((64, 64, 2), F32) * F32([1, 10])
    space = spaces.Box(np.zeros_like(high), high)
    seen = make_toy(Toy(space, lambda step: high / 2)).reset()["image"]
    assert set(seen.ravel().tolist()) == {128}


def test_an_empty_expression_stands_for_none():
    space = spaces.Dict({"image": box((64, 64, 3)), "state": box((2,), 1, F32)})
    assert make_toy(Toy(space), mlp_keys="").obs_space.keys() == {"image"}
    assert make_toy(Toy(space), cnn_keys="").obs_space.keys() == {"state"}
    assert kind_of(space["state"], env_config("any")) == "vector"
