"""CUDA graphs: a function's kernels recorded once, then launched all together, without Python between them.

An update of a small agent launches thousands of kernels that take microseconds each, so that most of its time would
be the host's. What is recorded must do the same work on the same memory at every call: fixed shapes, no number that
the host waits for, state changed in place.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

WARMUP = 3  # calls that run as they are written, in which libraries and compilers make their choices


class Captured:
    """Calls a function of tensors, and from the fourth call on replays what it did.

    Args:
      function: takes and returns trees of tensors (dicts, tuples, named tuples); their shapes never change.
      record: `record_cuda`, or what stands in for it where there is no GPU.
    """

    def __init__(self, function, record=None):
        self.function = function
        self.record = record or record_cuda
        self.calls = 0

    def __call__(self, *args):
        """What the function returns, in memory of the caller's own."""
        self.calls += 1
        if self.calls <= WARMUP:
            return self.function(*args)
        values, structure = tree_flatten(args)
        if self.calls == WARMUP + 1:
            self.inputs = [value.clone() for value in values]
            self.shapes = [(value.shape, value.dtype) for value in values]
            arguments = tree_unflatten(self.inputs, structure)
            self.replay, self.results = self.record(lambda: self.function(*arguments))
        assert self.shapes == [(value.shape, value.dtype) for value in values], "a captured function's inputs changed"
        for memory, value in zip(self.inputs, values, strict=True):
            memory.copy_(value, non_blocking=True)
        self.replay()
        leaves, structure = tree_flatten(self.results)
        return tree_unflatten([leaf.clone() for leaf in leaves], structure)


def record_cuda(function):
    """Record what a function launches. Returns a function that does it again, and the results that it fills."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # nothing runs yet
        results = function()
    assert all(leaf.is_cuda for leaf in tree_leaves(results))
    return graph.replay, results
