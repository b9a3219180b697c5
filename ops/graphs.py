"""CUDA graphs: record a function's kernels once, then launch all of them together, without Python in between.

An update of a small agent launches thousands of kernels that take microseconds each, so that the host would be the
bottleneck. A recorded function must do the same work on the same memory at every call: fixed shapes, no host sync,
state changed in place.
"""

import contextlib
import functools
import gc

import torch
from torch.cuda import memory as allocator
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

WARMUP = 3  # eager calls, in which libraries and compilers select their kernels


class Graphs:
    """Makes functions into `Captured` ones, until one of them cannot be recorded: from then on none is.

    Args:
      warn: function of one line, which is told why; it may raise an error, which ends the call.
    """

    def __init__(self, warn):
        self.warn, self.on = warn, True

    def __call__(self, function, generator=None):
        """Return a Captured function; generator: torch.Generator that it draws from, or None."""
        return Captured(function, generator, graphs=self)

    def give_up(self, error):
        """Say that something could not be recorded, once."""
        if self.on:
            self.on = False
            self.warn(f"an update or acting cannot be recorded as a CUDA graph: {' '.join(str(error).split())[:200]}")


class Captured:
    """Call a function of tensors; from the call after `WARMUP` on, record and replay its kernels.

    Args:
      function: takes and returns trees of tensors (dicts, tuples, named tuples); their shapes never change.
      generator: torch.Generator that the function draws from, or None.
      record: `record_cuda`, or a substitute for it without a GPU.
      graphs: Graphs, to be told of a failure; None lets its error pass.
    """

    def __init__(self, function, generator=None, record=None, graphs=None):
        self.function, self.generator, self.graphs = function, generator, graphs
        self.record = record or record_cuda
        self.calls = 0
        self.inputs = self.replay = None

    def __call__(self, *args):
        """Return copies of what the function returns, so that later calls do not overwrite them."""
        if self.replay is None and self.graphs is not None and not self.graphs.on:
            return self.function(*args)
        values, structure = tree_flatten(args)
        self.calls += 1
        if self.calls <= WARMUP:
            with beside(values[0].device):
                self.take(values, structure)
                return copied(self.function(*self.arguments))
        self.take(values, structure)
        if self.replay is None:
            try:
                self.begin()
            except RuntimeError as error:
                self.replay = None
                if self.graphs is None:
                    raise
                self.graphs.give_up(error)
                return self.function(*args)
        else:
            self.replay()
        return copied(self.results)

    def take(self, values, structure):
        """Copy the leaves of arguments, of this structure, to the memory that the function sees at every call.

        That of the warm-up is that of the recording: for inputs of other strides, a compiler would begin anew.
        """
        if self.inputs is None:
            self.inputs = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]
            self.shapes = [(value.shape, value.dtype) for value in values]
            self.arguments = tree_unflatten(self.inputs, structure)
        assert self.shapes == [(value.shape, value.dtype) for value in values], "a captured function's inputs changed"
        for memory, value in zip(self.inputs, values, strict=True):
            memory.copy_(value, non_blocking=True)

    def begin(self):
        """Record the function and replay it for the first time, on what `take` has taken.

        Raises RuntimeError if it cannot be recorded; then it has not run, or, on another device than the current one,
        runs whenever it is recorded, and never when it is replayed.
        """
        count = self.inputs[0].new_zeros((), dtype=torch.int64)

        def counted():
            count.add_(1)
            return self.function(*self.arguments)

        self.replay, self.results = self.record(counted, self.generator)
        before = int(count)
        self.replay()
        if int(count) != before + 1:
            raise RuntimeError(f"a graph that was recorded on {count.device} does nothing when it is launched")


def copied(tree):
    """Return a tree of tensors with each leaf cloned."""
    return tree_map(torch.clone, tree)


@functools.cache
def side_stream(device):
    """Return the one stream of a CUDA device for all that is warmed up and recorded there.

    Libraries keep workspaces by stream: what the warm-up has made is then there when the same is recorded.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def beside(device):
    """Run the body on the side stream of a CUDA device, after what was launched before and before what comes then."""
    if device.type != "cuda":
        yield None
        return
    stream, main = side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(main)
    try:
        with torch.cuda.stream(stream):  # goes back to `main` even where a recording that fails does not
            yield stream
    finally:
        main.wait_stream(stream)


def record_cuda(function, generator=None):
    """Record the kernels of a function; return a function that launches them again, and the results that it overwrites.

    It is recorded on the current device, and nothing runs. Other threads, such as one that writes files, may go on
    using the device meanwhile. Python's garbage is collected before and left alone meanwhile: to free a graph or a
    generator of another agent would end the recording.

    generator: torch.Generator that the function draws from, so that each replay draws other numbers.
    Raises RuntimeError if it cannot be recorded; the generator is then as it was.
    """
    graph, pool, collects = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), gc.isenabled()
    if generator is not None:
        before = generator.clone_state()
        graph.register_generator_state(generator)
    gc.collect()
    gc.disable()
    try:
        with (
            beside(torch.cuda.current_stream().device) as stream,
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            results = function()
    except RuntimeError:
        if generator is not None:
            generator.graphsafe_set_state(before)  # one whose recording has failed does not draw any more
        abandon(pool)
        raise
    finally:
        if collects:
            gc.enable()
    if not all(leaf.is_cuda for leaf in tree_leaves(results)):
        raise RuntimeError("a part of the results does not lie on the GPU")
    return graph.replay, results


def abandon(pool):
    """Take the memory pool of a recording that has failed out of use, if it still is in use.

    The allocator would believe for ever that the recording goes on, and then what has crossed streams is not freed.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        allocator._cuda_endAllocateToPool(device, pool)
        allocator._cuda_releasePool(device, pool)
