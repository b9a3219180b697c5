"""Measurements of throughput.py: updates, sampling and acting of a configuration, and shares of dreamer.py's loop."""

import contextlib
import functools
import itertools
import math
import resource
import sys
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import dreamer
from agents import make_agent
from benchmarks.pages import processor
from envs import make_envs
from modalities import obs_spec
from ops import graphs
from ops.random import drawing_from
from replay.sampling import make_replay
from specs import act_spec, step_layout
from tools import UserError
from training import machine

WARMUP = graphs.WARMUP + 1  # updates before the measured ones: the last of them may be recorded as a CUDA graph
ROTATION = 4  # batches
HELD = 10_000  # steps in the replay
EPISODE = 100  # steps
CROWDS = (1, 8, 16)  # environments that act together
REPEATS = 20  # of sampling and acting
PEAK = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices
PEAK_SECONDS = 0.5
THREADS = torch.get_num_threads()  # what `threads: 0` means
LOOP = {  # {share: where dreamer.py's loop spends it: (part, method)}
    "act": [("agent", "act"), ("random", "act")],
    "step": [("envs", "send"), ("envs", "receive")],
    "sample": [("replay", "sample"), ("agent", "batch"), ("rssm", "pack"), ("replay", "refresh")],
    "update": [("agent", "update")],
}


# ---------------------------------------------------------------------------
# What is measured


class Subject:
    """The agent and the replay of a configuration, with methods to time.

    Args:
      config: the whole configuration; folder: that its environment may write to.
    Raises UserError for an agent that is not trained by updates on batches.
    """

    def __init__(self, config, folder):
        held = max(HELD, 20 * (config.batch_length + 1))
        self.config = config.replace(
            logdir=folder,
            envs=1,
            parallel=False,
            offline_traindir="",
            dataset_size=held,
            steps=held * config.action_repeat,
        )
        self.device = machine.prepare(self.config)
        with contextlib.closing(make_envs(self.config, "train", 1)) as envs:  # for its spaces alone
            obs_space, act_space = envs.obs_space, envs.act_space
        self.specs = obs_spec(obs_space), act_spec(act_space)
        self.agent = make_agent(self.config, *self.specs)
        if not hasattr(self.agent, "update"):
            raise UserError(f"--agent {config.agent}: there is no update to time")
        self.replay = make_replay(self.config, step_layout(obs_space, self.specs[1]), self.agent, ([], []), self.device)
        self.steps = random_steps(obs_space, self.specs[1], 10 * EPISODE)
        length = len(self.steps["reward"])
        stored = random_stored(self.agent.stored, length)
        for number in range(math.ceil(held / length)):
            self.replay.extend(0, str(number), self.steps, stored)
        self.batches = itertools.cycle([self.sample() for _ in range(ROTATION)])
        self.carries = {count: self.agent.initial(count) for count in CROWDS}

    def select(self):
        """Set the process-wide settings to this subject's."""
        torch.set_num_threads(self.config.threads)
        machine.exact_products(self.config.precision == "32")

    def sample(self):
        """Move a batch from the replay to the device; return it with the state before it."""
        arrays, self.places = self.replay.sample(self.config.batch_size, fresh=False)
        return self.agent.batch(arrays)

    def update(self):
        """Take a gradient step on the next batch."""
        self.states, _ = update(self.agent, next(self.batches))

    def refresh(self):
        """Write the states of the last update back into the replay, as `Dreamer.learn` does."""
        if self.agent.stored:
            self.replay.refresh(self.places, self.agent.world.rssm.pack(self.states))

    def act(self, count):
        """Act once in `count` environments to collect data, including what the replay stores."""
        obs = {key: value[:count] for key, value in self.steps.items()}
        _, self.carries[count], _ = self.agent.act(obs, self.carries[count], "noisy")

    def flops(self):
        """Return the FLOPs of an update, counted on a separate agent, as this one may be compiled."""
        agent = make_agent(self.config.replace(compile=False, graphs="false"), *self.specs)
        return count_flops(lambda: update(agent, next(self.batches)))

    def peak(self):
        """Return the best FLOP/s of a large square matrix product in the compute dtype."""
        size = PEAK[self.device.type]
        a, b = torch.randn(2, size, size, device=self.device, dtype=self.agent.dtype)
        out, best, end = torch.empty_like(a), math.inf, time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < end or best == math.inf:
            best = min(best, seconds(self.device, torch.mm, a, b, out=out))
        return 2 * size**3 / best

    def describe(self):
        """Return the settings that identify a result."""
        return {
            "task": self.config.task,
            "parameters": sum(param.numel() for param in self.agent.nets.parameters() if param.requires_grad),
            "batch_size": self.config.batch_size,
            "batch_length": self.config.batch_length,
            "device": device_name(self.device),
            "threads": self.config.threads,
            "precision": "bf16" if self.agent.dtype == torch.bfloat16 else "32",
            "compile": self.config.compile,
            "graphs": machine.choose_graphs(self.config.graphs, self.device),
            "torch": torch.__version__,
        }


def update(agent, batch):
    """Take a gradient step on a batch and the state before it, with the random draws of `Dreamer.learn`."""
    with drawing_from(agent.generators["learn"]):
        return agent.update(*batch)


def random_steps(obs_space, act_spec, length):
    """Return random steps {key: (length, ...)} of these spaces; every other episode ends in a terminal state."""
    for space in obs_space.values():
        space.seed(0)
    steps = {key: np.stack([space.sample() for _ in range(length)]) for key, space in obs_space.items()}
    t, rng = np.arange(length), np.random.default_rng(0)
    steps |= {"is_first": t % EPISODE == 0, "is_last": t % EPISODE == EPISODE - 1}
    steps |= {"is_terminal": t % (2 * EPISODE) == EPISODE - 1}
    steps["reward"] = rng.standard_normal(length, np.float32)
    return steps | act_spec.uniform(rng, length)


def random_stored(stored, length):
    """Return {key: (length, ...)} to store with random steps: numbers in [0, 1), and class 0 of integers.

    stored: {key: (shape, dtype)} of one step.
    """
    rng = np.random.default_rng(0)
    return {key: rng.random((length, *shape)).astype(dtype) for key, (shape, dtype) in stored.items()}


def count_flops(function):
    """Return the FLOPs of the matrix products and convolutions of a call, its backward passes included."""
    counted = FlopCounterMode(display=False, custom_mapping={torch.ops.dreamer.mm: flops_of_product})
    with torch.compiler.set_stance("force_eager"), counted as counter:
        function()
    return counter.get_total_flops()


def flops_of_product(x_shape, y_shape, **_):
    """Return the FLOPs of `ops.products.multiply`."""
    return 2 * math.prod(x_shape) * y_shape[-1]


def device_name(device):
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def synchronize(device):
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device, function, *args, **kwargs):
    """Return the seconds that a call takes, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------
# Measuring


def measure(subjects, updates):
    """Measure subjects, which take turns at everything that is timed; return [result], seconds (subjects, updates)."""

    def alternate(count, method, *args):
        times = np.empty((len(subjects), count))
        for turn, index in itertools.product(range(count), range(len(subjects))):
            subjects[index].select()
            times[index, turn] = seconds(subjects[index].device, getattr(subjects[index], method), *args)
        return times

    def peaks():
        rates = []
        for subject in subjects:
            subject.select()
            rates.append(subject.peak())
        return rates

    def typical(method, *args):
        return 1e3 * np.median(alternate(WARMUP + REPEATS, method, *args)[:, WARMUP:], axis=1)

    first = alternate(WARMUP, "update").sum(1)
    rates = [peaks()]
    for subject in subjects:
        if subject.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(subject.device)
    times = alternate(updates, "update")
    memory = [peak_memory(subject.device) if len(subjects) == 1 else None for subject in subjects]
    rates = np.array([*rates, peaks()])
    sample, refresh = typical("sample"), typical("refresh")
    acts = {count: typical("act", count) for count in CROWDS}
    results = []
    for i, subject in enumerate(subjects):
        median, flops, peak = np.median(times[i]), subject.flops(), rates[:, i].max()
        result = {
            "ms_per_update": {name: 1e3 * getattr(np, name)(times[i]) for name in ("median", "min", "max")},
            "updates_per_s": 1 / median,
            "compile_s": max(0.0, first[i] - WARMUP * median),
            "flops": flops,
            "peak_gflops": peak / 1e9,
            "peaks_gflops": (rates[:, i] / 1e9).tolist(),  # before and after
            "mfu": flops / (median * peak),
            "peak_memory_mb": memory[i],
            "sample_ms": sample[i],
            "refresh_ms": refresh[i],
            "act_ms": {str(count): each[i] for count, each in acts.items()},
        }
        results.append(subject.describe() | result)
    return results, times


def peak_memory(device):
    """Return the peak of memory allocated on the device, or of the process if that is the CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Timers:
    """Measure seconds in watched methods; a call within another watched one counts for the outer one only."""

    def __init__(self, device):
        self.device = device
        self.totals = dict.fromkeys(LOOP, 0.0)
        self.inside = False

    def watch(self, name, owner, method):
        """Time a method of an object as part of the share `name` from now on."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            synchronize(self.device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.totals[name] += time.perf_counter() - start
                self.inside = False

        setattr(owner, method, timed)


def run_loop(config, frames, folder):
    """Return the frames per second of dreamer.py's loop once it learns, and the share of its time of each part."""
    with contextlib.ExitStack() as stack:
        config = config.replace(logdir=folder, eval_every=0, save_every=0, steps=2 * frames)
        parts = dreamer.wire(config.replace(eval_episode_num=0), stack)
        parts.random, parts.rssm, device = parts.run.random, parts.agent.world.rssm, parts.agent.device
        parts.envs = parts.envs.collecting
        parts.run.saved_at = math.inf  # so that no checkpoint is due
        run = parts.run

        def advance(frames):
            run.config = run.config.replace(steps=run.step + frames)
            dreamer.loop(run, parts.agent, parts.replay, parts.collect, lambda: None)

        while not run.filled() or run.updates < WARMUP * (config.train_ratio > 0):
            advance(1)
        timers = Timers(device)
        for name, places in LOOP.items():
            for part, method in places:
                timers.watch(name, getattr(parts, part), method)
        start = run.step
        total = seconds(device, advance, frames)
        shares = {name: spent / total for name, spent in timers.totals.items()}
        return {"fps": (run.step - start) / total, **shares, "rest": 1 - sum(shares.values())}


def profile(subject):
    """Print the operators of one update, sorted by self time; return the table."""
    for _ in range(WARMUP):
        subject.update()
    with torch.profiler.profile() as profiler:
        seconds(subject.device, subject.update)
    table = profiler.key_averages().table(f"self_{subject.device.type}_time_total", row_limit=25)
    print(table)
    return {"profile": table}
