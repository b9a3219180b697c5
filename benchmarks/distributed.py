"""Several ranks with a part of each batch, beside one process with all of it: is it the same, and how fast is it?

    torchrun --nproc_per_node 2 -m benchmarks.distributed                          # compares the forms of `CASES`
    torchrun --nproc_per_node 2 -m benchmarks.distributed --speed dmc_proprio      # updates per second

Each rank first makes the updates of one process and notes what was drawn; then the ranks make them together, each with
its rows of the batches and of what was drawn.
"""

import argparse
import itertools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("-m benchmarks.distributed")  # before the first package is imported

import numpy as np
import torch
from gymnasium.spaces import Box

from agents.dreamer import Dreamer
from modalities import obs_spec
from ops import collectives
from ops.random import drawing_from
from specs import act_spec
from training.config import CONFIGS, load_config
from training.distributed import joined

TINY = ["debug", "--opt.warmup", "0", "--opt.lr", "1e-3", "--model_opt.lr", "1e-3", "--actor_opt.lr", "1e-3"]
TINY += ["--critic_opt.lr", "1e-3", "--batch_size", "4"]
CASES = {  # presets and flags
    "dreamerv3": TINY,
    "dreamerv2": ["dreamerv2", *TINY],
    "plan2explore": [*TINY, "--expl_behavior", "plan2explore"],
    "icm and rnd": [*TINY, "--expl_behavior", "icm", "--intrinsic", "rnd"],
    "dreamerv3_2023": ["dreamerv3_2023", *TINY],
    "dreamerv1": ["dreamerv1", *TINY],
    "planet": ["planet", *TINY],
}
SPACES = {"state": Box(-1, 1, (14,))}, {"action": Box(-1, 1, (6,))}
UPDATES = 10


class Draws:
    """Draws noise and keeps it; later gives it again in the same order, of each tensor the rows of one rank.

    Args:
      seed: of the noise; rank, count: whose rows, of how many.
    """

    def __init__(self, seed, rank, count):
        self.generator = torch.Generator().manual_seed(seed)
        self.rank, self.count, self.kept = rank, count, []

    def draw(self, kind, shape):
        """Draw "uniform" or "normal" numbers."""
        function = {"uniform": torch.rand, "normal": torch.randn}[kind]
        self.kept.append(function(*shape, generator=self.generator))
        return self.kept[-1]

    def again(self, kind, shape):
        """Return the rows of this rank of what was drawn for all, whose shape is larger in one place."""
        whole = self.kept.pop(0)
        axis = [one != other for one, other in zip(whole.shape, shape, strict=True)].index(True)
        return whole.chunk(self.count, axis)[self.rank]


def make(words, seed=0):
    """Return an agent with initial parameters that were moved away from where critic and reward are constant."""
    torch.manual_seed(seed)
    config = load_config(["--configs", *words], CONFIGS)
    agent = Dreamer(obs_spec(SPACES[0]), act_spec(SPACES[1]), config)
    with torch.no_grad():
        for param in agent.nets.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return agent


def make_batches(agent, length=8):
    """Return random batches {key: (B, T, ...)}, one for each update, with episodes that end and begin."""
    rng, shape = np.random.default_rng(0), (agent.batch_size, length)
    for _ in range(UPDATES):
        last = rng.random(shape) < 0.1
        batch = {key: rng.uniform(-1, 1, (*shape, *space.shape)) for part in SPACES for key, space in part.items()}
        batch = {key: torch.from_numpy(value.astype(np.float32)) for key, value in batch.items()}
        batch |= {"reward": torch.from_numpy(rng.normal(size=shape).astype(np.float32))}
        first = np.concatenate([np.ones_like(last[:, :1]), last[:, :-1]], 1)
        flags = {"is_first": first, "is_last": last, "is_terminal": last & (rng.random(shape) < 0.5)}
        yield batch | {key: torch.from_numpy(value) for key, value in flags.items()}


def gradients(agent):
    """Return {name: gradient}, the mean over the ranks."""
    grads = {name: param.grad for name, param in agent.nets.named_parameters() if param.grad is not None}
    flat = [agent.opt.grad] if hasattr(agent.opt, "grad") else list(grads.values())
    collectives.average_(flat)
    return {name: grad.clone() for name, grad in grads.items()}


def learn(agent, batches, source):
    """Return the gradients of the first loss, then the parameters and metrics after an update on each batch."""
    metrics = []
    with drawing_from(source):
        for number, batch in enumerate(batches):
            state = agent.world.rssm.initial(len(batch["reward"]), "cpu", agent.dtype).map(torch.Tensor.detach)
            if number == 0:
                agent.opt.zero_grad()
                agent.total(agent.loss(batch, state)[0]).backward()
                first = gradients(agent)
            metrics.append(agent.update(batch, state)[1])
    return first, {name: param.detach().clone() for name, param in agent.nets.named_parameters()}, metrics


def compare(words, rank, count, updates=UPDATES):
    """Return the largest differences between one process and `count` ranks, and whether the ranks are bit-equal.

    Returns: {"gradient": of a tensor in the first loss, "change": of a tensor in all updates, both in the norm and
      relative, "metric": of any metric of the first update, relative, "equal": bool}
    """
    alone, draws = make(words), Draws(1, rank, count)
    before = {name: param.detach().clone() for name, param in alone.nets.named_parameters()}
    collectives.start(0, 1)
    batches = list(itertools.islice(make_batches(alone), updates))
    grads, params, metrics = learn(alone, batches, draws.draw)
    collectives.start(rank, count)
    parts = [{key: value.chunk(count)[rank] for key, value in batch.items()} for batch in batches]
    shared, own, told = learn(make(words), parts, draws.again)
    assert grads.keys() == shared.keys() and not draws.kept
    rows = collectives.gather(torch.cat([param.reshape(-1) for param in own.values()])).view(count, -1)
    return {
        "gradient": max(far(shared[name], grad) for name, grad in grads.items()),
        "change": max(far(own[name] - start, params[name] - start) for name, start in before.items()),
        "metric": max(far(told[0][name], value) for name, value in metrics[0].items()),
        "equal": bool((rows == rows[0]).all()),
    }


def far(one, other):
    """Return how far a tensor is from another, relative to that, in the norm."""
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def speed(words, rank, count, updates=30):
    """Return updates per second of all ranks, each with its part of the batch."""
    agent = make([*words, "--device", "cpu"])
    batch = {key: value.chunk(count)[rank] for key, value in next(make_batches(agent, 64)).items()}
    state = agent.world.rssm.initial(len(batch["reward"]), "cpu", agent.dtype).map(torch.Tensor.detach)
    times = []
    for _ in range(updates):
        start = time.perf_counter()
        agent.update(batch, state)
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", nargs="+", metavar="PRESET", help="time updates of presets on this CPU instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with joined(load_config(["--device", "cpu"], CONFIGS), collectives.start) as ranks:
        if args.speed:
            rate = speed(args.speed, ranks.rank, ranks.count)
            lines = [f"{' '.join(args.speed)}: {rate:.2f} updates/s with {ranks.count} ranks"]
        else:
            found = {name: compare(words, ranks.rank, ranks.count) for name, words in CASES.items()}
            lines = [f"{name:16} {values}" for name, values in found.items()]
        if ranks.rank == 0:
            print(*lines, sep="\n")


if __name__ == "__main__":
    main()
