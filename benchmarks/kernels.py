"""Count the kernels that one update would launch on a GPU, without one.

    python3 benchmarks/kernels.py --configs size1m --task dummy_vector --json kernels.json
    python3 benchmarks/kernels.py --configs size1m --task dummy_vector --against kernels.json
    python3 benchmarks/kernels.py --configs size1m --task dummy_vector --compiled

An operation that PyTorch dispatches counts as one kernel, forward, backward and optimizer; views and allocations launch
none; one on lists of tensors (`_foreach_`) as many as PyTorch's packing of them needs, or one for each tensor where the
shapes of the lists differ. They are dispatched on the CPU, in bf16, but norms and LaProp as they are written for a GPU.
The batch has two sequences: more of them launch no more kernels. The update is as it is written, or --compiled as on a
GPU: then a function that the compiler made of several operations counts as one. It makes them for the CPU; for a GPU it
would join much the same. --against shows the share of a file that another version of this project has written.
"""

import argparse
import collections
import contextlib
import json
import math
import pathlib
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/kernels.py")  # before the first package is imported

import numpy as np
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import ops.layers
import ops.optim
from agents.dreamer import Dreamer, compile_rest
from benchmarks.timing import random_steps
from envs import make_envs
from modalities import obs_spec
from specs import act_spec
from training.config import CONFIGS, load_config

VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "detach"}
VIEWS |= {"expand", "permute", "unbind", "alias", "_unsafe_view", "as_strided", "lift_fresh", "_reshape_alias"}
WRAPPERS = {"to", "reshape", "flatten", "contiguous", "mT", "chunk", "result_type", "unflatten", "item", "expand_as"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
PACKED = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # tensors that a kernel takes, by the number of lists (MultiTensorApply)


class Kernels(TorchDispatchMode):
    """Counts kernels by the name of their operation."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name not in VIEWS | ALLOCATIONS:
            self.counts[name] += launches(name, args)
        return function(*args, **(kwargs or {}))


def launches(name, args):
    """Return how many kernels an operation launches."""
    if name == "rms_norm_backward":
        return 2
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor)]
    if not name.startswith("_foreach_") or not lists:
        return 1
    if any(len({one.shape for one in group}) > 1 for group in zip(*lists, strict=True)):
        return len(lists[0])
    return math.ceil(len(lists[0]) / PACKED[min(len(lists), max(PACKED))])


@torch.library.custom_op("kernels::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / rms(x) * scale, and 1 / rms(x) (..., 1): a kernel of CUDA's."""
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse * scale, inverse


@torch.library.custom_op("kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of x and scale: two kernels of CUDA's."""
    unit, pulled = x * inverse, grad * scale
    pull = (pulled * unit).mean(-1, keepdim=True)
    return inverse * (pulled - unit * pull), (grad * unit).flatten(0, -2).sum(0)


def keep_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


rms_norm.register_autograd(
    lambda ctx, grad, _: (*rms_norm_backward(grad, *ctx.saved_tensors), None), setup_context=keep_norm
)


def counted_norm(x, shape, scale, eps):
    """Stand in for `F.rms_norm`, as one kernel."""
    return rms_norm(x, scale, eps)[0]


@contextlib.contextmanager
def kernels_of_cuda(norm=counted_norm):
    """Let norms and the optimizer take the operations that they take on CUDA, in the body; `norm`: for F.rms_norm."""
    with (
        mock.patch.object(ops.layers, "has_norm_kernel", lambda device: True),
        mock.patch.object(ops.optim, "repeats", lambda device: True),
        mock.patch.object(F, "rms_norm", norm),
    ):
        yield


def made(config):
    """Return the agent of a configuration, in bf16 on the CPU, and a batch for it of two sequences."""
    with contextlib.closing(make_envs(config, "train", 1)) as envs:
        spaces = envs.obs_space, envs.act_space
    specs = obs_spec(spaces[0]), act_spec(spaces[1])
    agent = Dreamer(*specs, config, "cpu", torch.bfloat16)
    steps = [random_steps(spaces[0], specs[1], config.batch_length) for _ in range(2)]
    return agent, agent.batch({key: np.stack([step[key] for step in steps]) for key in steps[0]})


@kernels_of_cuda()
def count(config):
    """Return {name: kernels} of one update of a configuration, as it is written."""
    agent, batch = made(config)
    agent.update(*batch)  # the first of some optimizers makes their state
    with Kernels() as kernels:
        agent.update(*batch)
    return kernels.counts


@kernels_of_cuda(F.rms_norm)  # which the compiler takes apart
def count_compiled(config):
    """Return {name: kernels} of one compiled update of a configuration; `compiled` are those that the compiler made."""
    inductor.cpp.enable_kernel_profile = True
    agent, batch = made(config)
    agent.compile_parts()
    compile_rest(agent)
    for _ in range(2):  # which compile
        agent.update(*batch)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        agent.update(*batch)
    counts = collections.Counter()
    for event in found.events():
        name = event.name.removeprefix("aten::")
        if event.name.startswith("graph_"):
            counts["compiled"] += 1
        elif name != event.name and not is_part(event):
            parts = {name, *(part.name.removeprefix("aten::") for part in event.cpu_children)}
            if name not in WRAPPERS or parts & {"_to_copy", "clone", "copy_"}:
                counts[name] += name not in VIEWS | ALLOCATIONS
    return +counts


def is_part(event):
    """Return True if an operation belongs to another one."""
    while event := event.cpu_parent:
        if event.name.startswith("aten::"):
            return True
    return False


def main(argv=None):
    """Print the counts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--compiled", action="store_true", help="count those of a compiled update")
    parser.add_argument("--json", metavar="OUT", help="write the counts there")
    parser.add_argument("--against", metavar="FILE", help="show the share of the counts in a file of --json")
    parser.add_argument("--most", type=int, default=20, help="operations that are shown (default: 20)")
    args, words = parser.parse_known_args(argv)
    config = load_config(words, CONFIGS)
    counts = (count_compiled if args.compiled else count)(config)
    total = sum(counts.values())
    for name, number in counts.most_common(args.most):
        print(f"{number:7,}  {name}")
    print(f"{total:7,}  kernels in all")
    if args.against:
        before = sum(json.loads(pathlib.Path(args.against).read_text()).values())
        print(f"{total / before:.1%} of {before:,}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
