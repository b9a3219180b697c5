"""What throughput.py measures: updates, sampling and acting of a configuration, and the shares of dreamer.py's loop."""

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
from agents.dreamer import Dreamer
from benchmarks.pages import processor

WARMUP = 3  # updates before those that count
ROTATION = 4  # batches
HELD = 10_000  # steps in the replay
EPISODE = 100  # steps
CROWDS = (1, 8, 16)  # environments that act together
REPEATS = 20  # of sampling and acting
PEAK = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices
PEAK_SECONDS = 0.5
THREADS = torch.get_num_threads()  # what `threads: 0` means
LOOP = {  # {share: where dreamer.py spends it: (attribute of the run, methods)}
    "act": [("agent", "act"), ("agent", "latents"), ("random", "act")],
    "step": [("envs", "step"), ("envs", "send"), ("envs", "receive")],
    "sample": [("replay", "sample"), ("agent", "batch"), ("agent", "compress"), ("replay", "refresh")],
    "update": [("agent", "update")],
}


# ---------------------------------------------------------------------------
# What is measured


class Subject:
    """The agent and the replay of a configuration, and what can be timed of them.

    Args:
      config: the whole configuration; folder: where a run may write.
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
        self.run = dreamer.Run(self.config)
        try:
            self.steps = random_steps(self.run, 10 * EPISODE)
        finally:
            self.run.close()  # only the spaces were wanted
        self.agent, self.replay, self.device = self.run.agent, self.run.replay, self.run.device
        length = len(self.steps["reward"])
        latents = random_latents(self.agent.latent_size, length)
        for number in range(math.ceil(held / length)):
            self.replay.extend(0, str(number), self.steps, latents)
        self.batches = itertools.cycle([self.sample() for _ in range(ROTATION)])
        self.memories = {}

    def select(self):
        """Give this subject's settings of the whole process back to it."""
        torch.set_num_threads(self.config.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.config.precision != "32"

    def sample(self):
        arrays, self.places = self.replay.sample(self.config.batch_size, fresh=False)
        return self.agent.batch(arrays)

    def update(self):
        self.states, _ = self.agent.update(*next(self.batches))

    def refresh(self):
        if self.replay.context:
            self.replay.refresh(self.places, *self.agent.compress(self.states))

    def act(self, count):
        obs = {key: value[:count] for key, value in self.steps.items()}
        _, self.memories[count] = self.agent.act(obs, self.memories.get(count))
        self.agent.latents(self.memories[count])

    def flops(self):
        """FLOPs of an update; of an agent of its own, as this one may be compiled."""
        config = self.config.replace(compile=False)
        agent = Dreamer(self.agent.obs_spec, self.agent.act_spec, config, self.device, self.agent.dtype)
        return count_flops(lambda: agent.update(*next(self.batches)))

    def peak(self):
        """Best FLOP/s of a large square matrix product in the compute dtype."""
        size = PEAK[self.device.type]
        a, b = torch.randn(2, size, size, device=self.device, dtype=self.agent.dtype)
        out, best, end = torch.empty_like(a), math.inf, time.perf_counter() + PEAK_SECONDS
        while time.perf_counter() < end or best == math.inf:
            best = min(best, seconds(self.device, torch.mm, a, b, out=out))
        return 2 * size**3 / best

    def describe(self):
        """What identifies a result."""
        return {
            "task": self.config.task,
            "parameters": sum(param.numel() for param in self.agent.parameters() if param.requires_grad),
            "batch_size": self.config.batch_size,
            "batch_length": self.config.batch_length,
            "device": device_name(self.device),
            "threads": self.config.threads,
            "precision": "bf16" if self.agent.dtype == torch.bfloat16 else "32",
            "compile": self.config.compile,
            "torch": torch.__version__,
        }


def random_steps(run, length):
    """{key: (length, ...)} steps of a run's spaces; of the episodes, every other one ends in a terminal state."""
    for space in run.envs.obs_space.values():
        space.seed(0)
    steps = {key: np.stack([space.sample() for _ in range(length)]) for key, space in run.envs.obs_space.items()}
    t = np.arange(length)
    steps |= {"is_first": t % EPISODE == 0, "is_last": t % EPISODE == EPISODE - 1}
    steps |= {"is_terminal": t % (2 * EPISODE) == EPISODE - 1}
    steps["reward"] = np.random.default_rng(0).standard_normal(length, np.float32)
    return steps | run.random.act(steps)[0]


def random_latents(sizes, length):
    """What the replay stores beside so many steps of latent widths (D, (S, K)); nothing for None."""
    if not sizes:
        return None
    rng, (deter, (groups, classes)) = np.random.default_rng(0), sizes
    return rng.standard_normal((length, deter)), rng.integers(classes, size=(length, groups))


def count_flops(function):
    """FLOPs of the matrix products and convolutions of a call, those of its backward passes included."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device, function, *args, **kwargs):
    """How long a call takes until the device has done it too."""
    synchronize(device)
    start = time.perf_counter()
    function(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------
# Measuring


def measure(subjects, updates):
    """Results of subjects that take turns at everything that is timed: [result], seconds (subjects, updates)."""

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
    """MB: most that was allocated on the device, or held by the process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Timers:
    """Seconds spent in methods that are watched; one that another calls counts for the outer one alone."""

    def __init__(self, device):
        self.device = device
        self.totals = dict.fromkeys(LOOP, 0.0)
        self.inside = False

    def watch(self, name, owner, method):
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
    """Frames per second of dreamer.py's loop once it learns, and the share of its time that each part takes."""
    run = dreamer.Run(config.replace(logdir=folder, eval_every=0, save_every=0, steps=2 * frames))
    run.finish = lambda: None  # evaluations and films at the end

    def advance(frames):
        run.config = run.config.replace(steps=run.step + frames)
        run.train()

    try:
        while not run.filled() or run.updates < WARMUP * (config.train_ratio > 0):
            advance(1)
        timers = Timers(run.device)
        for name, places in LOOP.items():
            for owner, method in places:
                if hasattr(getattr(run, owner), method):
                    timers.watch(name, getattr(run, owner), method)
        start = run.step
        total = seconds(run.device, advance, frames)
        shares = {name: spent / total for name, spent in timers.totals.items()}
        return {"fps": (run.step - start) / total, **shares, "rest": 1 - sum(shares.values())}
    finally:
        run.close()


def profile(subject):
    """Print the operators of one update by the time that they take themselves; returns the table."""
    for _ in range(WARMUP):
        subject.update()
    with torch.profiler.profile() as profiler:
        seconds(subject.device, subject.update)
    table = profiler.key_averages().table(f"self_{subject.device.type}_time_total", row_limit=25)
    print(table)
    return {"profile": table}
