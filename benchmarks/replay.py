"""Check that sampling does not slow down with episodes: time a batch of 16 x 65 steps from few and from many.

python3 benchmarks/replay.py
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/replay.py")  # before the first package is imported

import numpy as np

from replay.sampling import Replay

BATCH, LENGTH = 16, 64  # and one step of context
EPISODE = 100  # steps
FLAGS = {"reward": ((), np.float32), "is_first": ((), bool), "is_last": ((), bool), "is_terminal": ((), bool)}
LAYOUTS = {  # {name: (layout of a step, layout of what an agent stores with it, number of many episodes)}
    "proprio, size1m": (
        {"position": ((8,), np.float32), "velocity": ((9,), np.float32), "action": ((6,), np.float32), **FLAGS},
        {"deter": ((512,), np.float16), "stoch": ((32,), np.uint8)},
        20_000,
    ),
    "64x64 images, size12m": (
        {"image": ((64, 64, 3), np.uint8), "action": ((6,), np.float32), **FLAGS},
        {"deter": ((2048,), np.float16), "stoch": ((32,), np.uint8)},
        1_000,
    ),
}


def fill(layout, stored, episodes):
    """Return a replay with this many episodes, and how many steps per second were added one by one."""
    replay = Replay(layout, stored, streams=1, capacity=episodes * EPISODE, length=LENGTH, context=1)
    rng = np.random.default_rng(0)
    episode = {key: rng.integers(0, 2, (EPISODE, *shape)).astype(dtype) for key, (shape, dtype) in layout.items()}
    beside = {key: np.ones((EPISODE, *shape), dtype) for key, (shape, dtype) in stored.items()}
    start = time.perf_counter()
    for t in list(range(EPISODE)) * 50:
        replay.add(0, *({key: value[t] for key, value in part.items()} for part in (episode, beside)))
    rate = EPISODE * 50 / (time.perf_counter() - start)
    for number in range(50, episodes):
        replay.extend(0, str(number), episode, beside)
    return replay, rate


def time_sample(replay, count=300):
    """Return the median time to sample a batch, in seconds."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        replay.sample(BATCH, fresh=False)
        times.append(time.perf_counter() - start)
    return np.median(times[count // 10 :])


def main():
    """Print times and their ratio for each layout."""
    for name, (layout, stored, many) in LAYOUTS.items():
        seconds = {}
        for episodes in (100, many):
            replay, rate = fill(layout, stored, episodes)
            seconds[episodes] = time_sample(replay)
            print(
                f"{name}: {episodes:6,} episodes of {EPISODE} steps: {1e3 * seconds[episodes]:.3f} ms "
                f"for a batch of {BATCH}x{LENGTH + 1}, {rate:,.0f} steps/s added"
            )
        print(f"{name}: ratio {seconds[many] / seconds[100]:.2f}")


if __name__ == "__main__":
    main()
