"""Measure how fast an agent learns and acts on this machine, and its share of the hardware's peak.

python3 benchmarks/throughput.py --configs dmc_proprio size1m --device cpu --precision 32 --updates 20 --json out.json

All flags other than those below are dreamer.py's. The task's environment is made to learn its spaces; the
updates then run on random steps of these spaces, several batches in turn, out of a replay that is filled with them.

- An update is `Dreamer.update` on a batch that lies on the device already. `sample` is a batch from the replay to the
  device, `refresh` its new latents from the device back into the replay, `act` one action in each of 1, 8 and 16
  environments together with what is stored of it in the replay.
- The first updates are separate: their time beyond that of as many median ones is `compile_s`, whatever causes it.
- FLOPs are those of matrix products and convolutions, forward and backward, two for a multiply and an add, counted in
  an update that is not compiled. The peak is the best rate of one large square matrix product in the same dtype, right
  before and right after the updates: MFU = FLOPs / (median time x peak).
- Peak memory is the high-water mark of the process on CPU (PyTorch, environment and replay included), and what was
  allocated at most during the updates on CUDA.
- `--loop` runs dreamer.py's own loop on the real task, with prefill and first updates before the clock starts, and
  without evaluations and checkpoints. Its shares are of wall time: `step` is what the loop waits for environments,
  `sample` includes `refresh`, `rest` is everything else. On CUDA every border waits for the
  device, which the real loop does not: frames per second are a lower bound there.
- `--compare` times both settings in this process in turns, so that other load on the machine affects both.
"""

import itertools
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/throughput.py")  # before the first package is imported

import numpy as np

from benchmarks.timing import THREADS, WARMUP, Subject, measure, profile, run_loop
from tools import Parser, UserError, atomic_write
from training.config import CONFIGS, load_config

QUIET = {"logger": (), "log_level": "error", "script": "train", "eval_envs": 1}


def main(argv=None):
    """Run the command line; return the exit status."""
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
    """Raise UserError for contradictory flags."""
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
    """Run the command; return the result for the JSON file. words: flags of dreamer.py."""
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
    """Return a command line of dreamer.py from presets and further words."""
    return [*(["--configs", *configs] if configs else []), *words]


def write(path, result):
    """Write a result as JSON, atomically."""
    try:
        atomic_write(path, lambda file: file.write(json.dumps(result, indent=2).encode()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


# ---------------------------------------------------------------------------
# Reports


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
    """Return {dotted name: number} of a result."""
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
    """Print the ratios of two files of --json; return both."""
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
            load_config(points[-1][-1], CONFIGS)  # so that mistakes are reported before anything is measured
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
    """Return the result of a command line of this script, run in a new process with fresh memory and compiler."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *words, "--json", file.name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"{shlex.join(words)}: {last.removeprefix('throughput.py: ')}")
        return json.loads(pathlib.Path(file.name).read_text())


def plot(results, path):
    """Plot the time of an update, and its ideal time at the peak, over the values of each sweep."""
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
    except (OSError, ValueError) as error:  # unknown format
        raise UserError(f"--plot {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
