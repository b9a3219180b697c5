"""How fast an agent learns and acts on this machine, and how much of the hardware that is.

python3 benchmarks/throughput.py --configs dmc_proprio size1m --device cpu --precision 32 --updates 20 --json out.json

Every flag that is not listed below is one of dreamer.py. The task's environment is made to learn its spaces; the
updates then run on random steps of these spaces, several batches in turn, out of a replay that is filled with them.

- An update is `Dreamer.update` on a batch that lies on the device already. `sample` is a batch from the replay to the
  device, `refresh` its new latents from the device back into the replay, `act` one action in each of 1, 8 and 16
  environments together with the latents that go to the replay.
- The first updates count apart: what they take beyond as many median ones is `compile_s`, whatever causes it.
- FLOPs are those of matrix products and convolutions, forward and backward, two for a multiply and an add, counted in
  an update that is not compiled. The peak is the best rate of one large square matrix product in the same dtype, right
  before and right after the updates: MFU = FLOPs / (median time x peak).
- Peak memory is the high-water mark of the process on CPU (PyTorch, environment and replay included), and what was
  allocated at most during the updates on CUDA.
- `--loop` runs dreamer.py's own loop on the real task, with prefill and first updates before the clock starts, and
  without evaluations and checkpoints. Its shares are of wall time: `step` is what the loop waits for environments,
  `sample` holds `refresh` too, `rest` is whatever happens in none of the others. On CUDA every border waits for the
  device, which the real loop does not: frames per second are a lower bound there.
- `--compare` times both settings in this process in turns, so that both meet the same weather.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import resource
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dreamer
from agent import Dreamer
from benchmarks.pages import processor
from config import CONFIGS, load_config
from tools import UserError, atomic_write

WARMUP = 3  # updates before those that count
ROTATION = 4  # batches
HELD = 10_000  # steps in the replay
EPISODE = 100  # steps
CROWDS = (1, 8, 16)  # environments that act together
REPEATS = 20  # of sampling and acting
PEAK = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices
PEAK_SECONDS = 0.5
THREADS = torch.get_num_threads()  # what `threads: 0` means
QUIET = {"logger": (), "log_level": "error", "script": "train", "eval_envs": 1}
LOOP = {  # {share: where dreamer.py spends it: (attribute of the run, methods)}
    "act": [("agent", "act"), ("agent", "latents"), ("random", "act")],
    "step": [("envs", "step"), ("envs", "send"), ("envs", "receive")],
    "sample": [("replay", "sample"), ("agent", "batch"), ("agent", "compress"), ("replay", "refresh")],
    "update": [("agent", "update")],
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main(argv=None):
    """Run the command line; returns the exit status."""
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="All other flags are those of dreamer.py, such as --compile false or --batch_size 8.",
        allow_abbrev=False,
    )
    parser.add_argument("--configs", nargs="+", default=[], metavar="PRESET", help="presets, as for dreamer.py")
    parser.add_argument("--updates", type=int, default=20, help="updates that are timed (default: 20)")
    parser.add_argument("--json", metavar="OUT", help="write the results there")
    parser.add_argument("--loop", type=int, default=0, metavar="FRAMES", help="time the whole loop for so many frames")
    parser.add_argument("--profile", action="store_true", help="show in which operators an update spends its time")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help='two sets of further flags ("--compile false" "--compile true"), or two files of --json',
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="one result for each value, in a process of its own; size=size1m,size12m takes presets",
    )
    parser.add_argument("--plot", metavar="OUT.png", help="draw the sweeps")
    try:
        args, words = parser.parse_known_args(argv)
        check(args)
        result = choose(args, words)
        if args.json:
            write(args.json, result)
    except UserError as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2
    return 0


def check(args):
    """Raise UserError for flags that cannot be."""
    for name, least in {"updates": 1, "loop": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    if args.plot and not args.sweep:
        raise UserError("--plot needs a --sweep")
    several = [f"--{name}" for name in ("compare", "sweep", "profile") if getattr(args, name)]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)} do not go together")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path and not pathlib.Path(path).absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: no such directory")


def choose(args, words):
    """Do what the flags ask for; returns what goes to the JSON file. words: flags of dreamer.py."""
    if args.sweep:
        return sweep(args, words)
    if args.compare and all(name.endswith(".json") for name in args.compare):
        return compare_files(*args.compare)
    sets = [flags(args.configs, *words, *shlex.split(more)) for more in args.compare or [""]]
    settings = [load_config(words, CONFIGS) for words in sets]
    settings = [config.replace(**QUIET, threads=config.threads or THREADS) for config in settings]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        subjects = [Subject(config, f"{folder}/{index}") for index, config in enumerate(settings)]
        if args.profile:
            return profile(subjects[0])
        results, times = measure(subjects, args.updates)
        for index, result in enumerate(results):
            result["flags"], result["configs"] = shlex.join(sets[index]), args.configs
            result["loop"] = run_loop(settings[index], args.loop, f"{folder}/loop{index}") if args.loop else None
    if args.compare:
        return compare(results, times)
    report(results[0])
    return results[0]


def flags(configs, *words):
    """A command line of dreamer.py from presets and further words."""
    return [*(["--configs", *configs] if configs else []), *words]


def write(path, result):
    try:
        atomic_write(path, lambda file: file.write(json.dumps(result, indent=2).encode()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


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


# ---------------------------------------------------------------------------
# Telling


def report(result):
    """Print a result."""
    ms, before, after = result["ms_per_update"], *result["peaks_gflops"]
    print(
        f"{result['flags']}\n{result['task']}, {result['parameters']:,} parameters, "
        f"batch {result['batch_size']}x{result['batch_length']}, {result['precision']}, "
        f"compile {str(result['compile']).lower()}, threads {result['threads']}, torch {result['torch']}\n"
        f"{result['device']}\n"
        f"update   {ms['median']:.1f} ms ({ms['min']:.1f} to {ms['max']:.1f}), {result['updates_per_s']:.2f} a second; "
        f"the first {WARMUP} took {result['compile_s']:.1f} s longer\n"
        f"work     {result['flops'] / 1e9:.1f} GFLOP; peak {result['peak_gflops']:.0f} GFLOP/s "
        f"(before {before:.0f}, after {after:.0f}); MFU {result['mfu']:.3f}\n"
        f"memory   {result['peak_memory_mb']:.0f} MB\n"
        f"sample   {result['sample_ms']:.2f} ms, refresh {result['refresh_ms']:.2f} ms\n"
        f"act      " + ", ".join(f"{ms:.2f} ms for {count}" for count, ms in result["act_ms"].items())
    )
    if result["loop"]:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in result["loop"].items() if name != "fps")
        print(f"loop     {result['loop']['fps']:.1f} frames/s: {shares}")


def flat(tree, prefix=""):
    """{dotted name: number} of a result."""
    numbers = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[prefix + name] = value
    return numbers


def print_ratios(a, b):
    """Print the numbers of two results side by side, and A/B."""
    print(f"A: {a['flags']}\nB: {b['flags']}\n{'':20}{'A':>14}{'B':>14}{'A/B':>9}")
    theirs = flat(b)
    for name, value in flat(a).items():
        if name in theirs:
            ratio = f"{value / theirs[name]:9.3f}" if theirs[name] else f"{'-':>9}"
            print(f"{name:20}{value:14.5g}{theirs[name]:14.5g}{ratio}")


def compare(results, times):
    """Print and return two results that were measured in turns; times: seconds (2, updates)."""
    print_ratios(*results)
    low, median, high = np.percentile(times[0] / times[1], [25, 50, 75])
    print(f"time of an update, A/B turn by turn: {median:.3f} (quartiles {low:.3f} to {high:.3f})")
    return {"a": results[0], "b": results[1], "ratio": {"median": median, "low": low, "high": high}}


def compare_files(*paths):
    """Print the ratios of two files of --json; returns both."""
    results = []
    for path in paths:
        try:
            result = json.loads(pathlib.Path(path).read_text())
            result["flags"], result["ms_per_update"]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no result of a single measurement") from None
        results.append(result)
    print_ratios(*results)
    return dict(zip("ab", results, strict=True))


# ---------------------------------------------------------------------------
# Sweeps


def sweep(args, words):
    """Print, draw and return the results for each value of each --sweep."""
    points = []
    for text in args.sweep:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(f"--sweep {text}: expected KEY=VALUE,VALUE,...")
        for value in values.split(","):
            point = [*args.configs, value] if key == "size" else args.configs
            more = [] if key == "size" else [f"--{key}", value]
            points.append((key, value, flags(point, *words, *more)))
            load_config(points[-1][-1], CONFIGS)  # mistakes show before anything is measured
    print(f"{'':24}{'parameters':>12}{'ms':>10}{'GFLOP':>10}{'peak':>8}{'MFU':>7}{'MB':>8}{'frames/s':>10}")
    results = []
    for key, value, command in points:
        result = measure_alone([*command, "--updates", str(args.updates), "--loop", str(args.loop)])
        results.append({"sweep": key, "value": value} | result)
        print(
            f"{key + ' ' + value:24}{result['parameters']:12,}{result['ms_per_update']['median']:10.1f}"
            f"{result['flops'] / 1e9:10.1f}{result['peak_gflops']:8.0f}{result['mfu']:7.3f}"
            f"{result['peak_memory_mb']:8.0f}" + (f"{result['loop']['fps']:10.1f}" if args.loop else ""),
            flush=True,
        )
    if args.plot:
        plot(results, args.plot)
    return results


def measure_alone(words):
    """The result of a command line of this script in a process of its own: memory and compiler start afresh."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *words, "--json", file.name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"{shlex.join(words)}: {last.removeprefix('throughput.py: ')}")
        return json.loads(pathlib.Path(file.name).read_text())


def plot(results, path):
    """Draw the time of an update, and what it would take at the peak, over the values of each sweep."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError("matplotlib is not installed: pip install -r requirements/plots.txt") from None
    plt.switch_backend("Agg")  # no screen
    panels = {key: list(group) for key, group in itertools.groupby(results, lambda result: result["sweep"])}
    figure, row = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axes, (key, group) in zip(row[0], panels.items(), strict=True):
        places = range(len(group))
        axes.plot(places, [result["ms_per_update"]["median"] for result in group], "o-", label="measured")
        floors = [1e3 * result["flops"] / (1e9 * result["peak_gflops"]) for result in group]
        axes.plot(places, floors, "s--", label="its FLOPs at the peak rate")
        axes.set(xticks=places, xticklabels=[result["value"] for result in group], xlabel=key, yscale="log")
        axes.grid(alpha=0.3)
    row[0][0].set_ylabel("ms per update")
    row[0][0].legend()
    figure.suptitle(f"{results[0]['task']}, {results[0]['precision']}, {results[0]['device']}", fontsize="medium")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # no such format
        raise UserError(f"--plot {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
