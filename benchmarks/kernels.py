"""Count the kernels that one update would launch on a GPU, without one.

    python3 benchmarks/kernels.py --configs size1m --task dummy_vector --json kernels.json
    python3 benchmarks/kernels.py --configs size1m --task dummy_vector --against kernels.json

An operation that PyTorch dispatches counts as one kernel, forward, backward and optimizer; views and allocations launch
none; one on lists of tensors (`_foreach_`) as many as PyTorch's packing of them needs, or one for each tensor where the
shapes of the lists differ. They are dispatched on the CPU, in bf16 as on a GPU, with a batch of one sequence: nothing
that they are depends on the device (but for PyTorch's own Adam) or on the size of the batch. The update is as it is
written: compilation joins many of these. --against shows the share of a file that another version of this project has
written.
"""

import argparse
import collections
import contextlib
import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents.dreamer import Dreamer
from benchmarks.timing import random_steps
from envs import make_envs
from modalities import obs_spec
from specs import act_spec
from training.config import CONFIGS, load_config

VIEWS = {"view", "t", "transpose", "unsqueeze", "squeeze", "select", "slice", "split", "split_with_sizes", "detach"}
VIEWS |= {"expand", "permute", "unbind", "alias", "_unsafe_view", "as_strided", "lift_fresh", "_reshape_alias"}
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
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor)]
    if not name.startswith("_foreach_") or not lists:
        return 1
    if any(len({one.shape for one in group}) > 1 for group in zip(*lists, strict=True)):
        return len(lists[0])
    return math.ceil(len(lists[0]) / PACKED[min(len(lists), max(PACKED))])


def count(config):
    """Return the Kernels of one update of a configuration, on one sequence of its length."""
    with contextlib.closing(make_envs(config, "train", 1)) as envs:
        spaces = envs.obs_space, envs.act_space
    specs = obs_spec(spaces[0]), act_spec(spaces[1])
    agent = Dreamer(*specs, config, "cpu", torch.bfloat16)
    steps = random_steps(spaces[0], specs[1], config.batch_length)
    batch = agent.batch({key: value[None] for key, value in steps.items()})
    agent.update(*batch)  # the first of some optimizers makes their state
    with Kernels() as kernels:
        agent.update(*batch)
    return kernels


def main(argv=None):
    """Print the counts; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--json", metavar="OUT", help="write the counts there")
    parser.add_argument("--against", metavar="FILE", help="show the share of the counts in a file of --json")
    parser.add_argument("--most", type=int, default=20, help="operations that are shown (default: 20)")
    args, words = parser.parse_known_args(argv)
    config = load_config(words, CONFIGS).replace(compile=False)
    counts = count(config).counts
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
