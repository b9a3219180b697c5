"""CUDA graphs: record a function's kernels once, then launch all of them together, without Python in between.

An update of a small agent launches thousands of kernels that take microseconds each, so that the host would be the
bottleneck. A recorded function must do the same work on the same memory at every call: fixed shapes, no host sync,
state changed in place.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

WARMUP = 3  # eager calls, in which libraries and compilers select their kernels


class Captured:
    """Call a function of tensors; from the call after `WARMUP` on, record and replay its kernels.

    Args:
      function: takes and returns trees of tensors (dicts, tuples, named tuples); their shapes never change.
      generator: torch.Generator that the function draws from, or None.
      record: `record_cuda`, or a substitute for it without a GPU.
    """

    def __init__(self, function, generator=None, record=None):
        self.function, self.generator = function, generator
        self.record = record or record_cuda
        self.calls = 0

    def __call__(self, *args):
        """Return copies of what the function returns, so that later calls do not overwrite them."""
        self.calls += 1
        if self.calls <= WARMUP:
            return self.function(*args)
        values, structure = tree_flatten(args)
        if self.calls == WARMUP + 1:
            self.inputs = [value.clone() for value in values]
            self.shapes = [(value.shape, value.dtype) for value in values]
            arguments = tree_unflatten(self.inputs, structure)
            self.replay, self.results = self.record(lambda: self.function(*arguments), self.generator)
        assert self.shapes == [(value.shape, value.dtype) for value in values], "a captured function's inputs changed"
        for memory, value in zip(self.inputs, values, strict=True):
            memory.copy_(value, non_blocking=True)
        self.replay()
        leaves, structure = tree_flatten(self.results)
        return tree_unflatten([leaf.clone() for leaf in leaves], structure)


def record_cuda(function, generator=None):
    """Record the kernels of a function; return a function that launches them again, and the results that it overwrites.

    generator: torch.Generator that the function draws from, so that each replay draws other numbers.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # records only: nothing runs yet
        results = function()
    assert all(leaf.is_cuda for leaf in tree_leaves(results))
    return graph.replay, results
