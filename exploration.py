"""How to collect data other than by the task's own policy."""

import numpy as np


class Random:
    """Acts uniformly at random, with the interface of an agent's `act`.

    Args:
      spec: ActionSpec; seed: of the actions.
    """

    def __init__(self, spec, seed):
        self.spec = spec
        self.rng = np.random.default_rng(seed)

    def act(self, obs, memory=None):
        """{key: (N, ...)} -> {key: (N, width)} float32: values in [-1, 1], or one-hots of discrete keys; no memory."""
        count = len(obs["is_first"])
        return {key: self.draw(key, width, count) for key, width in self.spec.widths.items()}, None

    def draw(self, key, width, count):
        classes = self.spec.classes.get(key)
        if not classes:
            return self.rng.uniform(-1, 1, (count, width)).astype(np.float32)
        parts = [np.eye(size, dtype=np.float32)[self.rng.integers(size, size=count)] for size in classes]
        return np.concatenate(parts, 1)
