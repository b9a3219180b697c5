"""World Models on small tasks: what C learns in M's dream alone, how fast a dream is, and a run of CarRacing.

python3 benchmarks/world_models.py dream --out logdir/dreams --write docs/world_models.md
python3 benchmarks/world_models.py throughput --write docs/world_models.md
python3 benchmarks/world_models.py race --out logdir/race --write docs/world_models.md

`dream` runs dreamer.py one run after the other: finished ones are left alone, others begin or go on. `race` reads the
run of `--configs race --logdir OUT`, and plays what is missing: random actions, and whole episodes with the best C.
Prints a table, puts it between its markers in a page, and draws OUT.png.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/world_models.py")  # before the first package is imported

import gymnasium
import numpy as np
import torch

from agents.policy import load_policy
from agents.random import Random
from agents.world_models import WorldModels
from benchmarks.family import MISSING, final_scores, lines
from benchmarks.pages import digits, markdown, mean_and_error, publish
from envs import make_env, make_envs
from modalities import obs_spec
from ops.random import drawing_from, make_generator
from specs import act_spec, step_layout
from tools import Parser, UserError, atomic_write, derive_seed
from training.config import CONFIGS, load_config
from training.evaluation import Evaluation

ROOT = pathlib.Path(__file__).resolve().parent.parent

RUNS = {  # of `--configs dream`: name -> flags
    "z and h, τ 1.15": "",
    "z alone": "--stages.inputs z",
    "M untrained": "--stages.m_updates 0",
    "τ 0.5": "--stages.temperature 0.5",
    "τ 1.0": "--stages.temperature 1.0",
    "τ 1.3": "--stages.temperature 1.3",
}
EPISODES = 20  # of an evaluation, and of random actions
DREAMS = 8  # times the preset's rollouts, by which the best C is judged in the dream
STEPS = 300  # that are timed


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=pathlib.Path, help="where the runs are; the plot is OUT.png")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    return publish(parser, argv, told)


def told(args):
    """Return what a command has to tell."""
    if not args.out and args.command != "throughput":
        raise UserError(f"{args.command} needs an --out")
    return COMMANDS[args.command](args)


def call(flags, logdir):
    """Run dreamer.py into a logdir, and add the seconds that it took to a file there."""
    logdir.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with open(logdir / "output.txt", "a") as output:
        command = [sys.executable, str(ROOT / "dreamer.py"), *flags, "--logdir", str(logdir)]
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    with open(logdir / "seconds.txt", "a") as file:
        file.write(f"{time.monotonic() - begin:.0f}\n")
    if code:
        raise UserError(f"{logdir}/output.txt: exit status {code}")
    (logdir / "done").touch()


def is_done(logdir):
    """True if `call` has finished."""
    return (logdir / "done").exists()


# ---------------------------------------------------------------------------
# In the dream alone


def dream(args):
    """Compare what C reaches in reality and in the dream that it has learned in; draw both."""
    logdirs = {name: [args.out / f"{slug(name)}_{seed}" for seed in range(args.seeds)] for name in RUNS}
    first = next(iter(RUNS))
    jobs = [(first, seed) for seed in range(args.seeds)]
    jobs += [(name, seed) for seed in range(args.seeds) for name in RUNS if name != first]
    for name, seed in jobs:
        if not (args.finished or is_done(logdirs[name][seed])):
            flags = ["--configs", "dream", *RUNS[name].split(), "--seed", str(seed)]
            call([*flags, "--eval_episode_num", str(EPISODES)], logdirs[name][seed])
    rows, points = [], {}
    for name, found in logdirs.items():
        done = list(filter(is_done, found))
        points[name] = [(dreamt(logdir), float(np.mean(final_scores(logdir)))) for logdir in done]
        real = ", ".join(f"{score:.0f}" for _, score in points[name]) or MISSING
        inner = ", ".join(f"{score:.0f}" for score, _ in points[name]) or MISSING
        gap = f"{np.mean([a - b for a, b in points[name]]):+.0f}" if done else MISSING
        minutes = f"{max(seconds(logdir) for logdir in done) / 60:.1f}" if done else MISSING
        rows.append([name, f"`{RUNS[name]}`" if RUNS[name] else "", real, inner, gap, minutes])
    draw_dreams(args.out, points, {name: [d for d in found if is_done(d)] for name, found in logdirs.items()})
    head = ("", "flags", "real return, by seed", "dreamt return, by seed", "dreamt minus real", "minutes, the longest")
    return markdown(head, rows)


def slug(name):
    """Return a name as that of a folder."""
    return "".join(c if c.isalnum() or c == "." else "_" for c in name.replace("τ", "tau"))


def seconds(logdir):
    """Return how long a run took, all its parts together."""
    return sum(float(line) for line in (logdir / "seconds.txt").read_text().split())


def dreamt(logdir):
    """Return the mean return of the best C in dreams from the run's own first latents, at the run's temperature."""
    agent = load_policy(logdir, "cpu").agent
    generator = make_generator(0, agent.device)
    with drawing_from(generator):
        return float(agent.dream.fitness(np.repeat(agent.best[None], DREAMS, 0), agent.starts, generator).mean())


def generations(logdir):
    """Return {generation: mean fitness of the candidates} and {generation: real return of the mean}."""
    agent = load_policy(logdir, "cpu").agent
    fitness = {index + 1: float(np.mean(told)) for index, told in enumerate(agent.evolution.told)}
    before = agent.config.v_updates + agent.config.m_updates
    rows = [row for row in lines(logdir / "metrics.jsonl") if "score" in row]
    every = agent.config.score_every  # a score is logged with the generations that follow it
    return fitness, {int((row["updates"] - before - 1) // every * every): row["score"] for row in rows}


def draw_dreams(out, points, logdirs):
    """Draw dreamt against real returns, and both over the generations of the first seed at each temperature."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, pairs in points.items():
        if pairs:
            left.scatter(*zip(*pairs, strict=True), label=name)
    left.plot([0, 500], [0, 500], color="gray", linestyle=":")
    left.set(xlabel="dreamt return of the best C", ylabel=f"real return, {EPISODES} episodes")
    for name, found in logdirs.items():
        if found and "τ" in name:
            fitness, scores = generations(found[0])
            (line,) = right.plot(list(fitness), list(fitness.values()), label=f"{name}, dreamt")
            right.plot(list(scores), list(scores.values()), color=line.get_color(), linestyle="--", marker="o", ms=3)
    right.set(xlabel="generation (seed 0)", ylabel="mean return: lines dreamt, dots in reality")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.legend(fontsize=8)
    figure.savefig(f"{out}.png", dpi=130)


def pyplot():
    """Return matplotlib.pyplot, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


# ---------------------------------------------------------------------------
# How fast a dream is


def throughput(args):
    """Compare the steps of dreams, of 64 candidates by 16 rollouts, with those of CarRacing, in seconds of one core."""
    torch.set_num_threads(1)
    rows = []
    for name, flags in {"z 32, h 256, as in the paper": "", "z 16, h 64": "--stages.z 16 --stages.hidden 64"}.items():
        config = load_config(["--configs", "carracing", "world_models", "--device", "cpu", *flags.split()], CONFIGS)
        rows.append([f"dream, {name}", digits(dream_rate(config))])
    config = load_config(["--configs", "carracing"], CONFIGS)
    with contextlib.closing(make_env(config, "train", 0)) as env:
        env.reset()
        rate = env_rate(lambda action: env.step({"action": action}))
        rows.append(["CarRacing, `--configs carracing`", digits(rate)])
    with contextlib.closing(gymnasium.make("CarRacing-v3")) as plain:
        plain.reset(seed=0)
        rows.append(["CarRacing, as Gymnasium draws it", digits(env_rate(plain.step))])
    return markdown(("", "steps per second of one core"), rows)


def dream_rate(config):
    """Return dreamt steps per second of CPU time, of all candidates together."""
    spaces = (
        {"image": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)},
        {"action": gymnasium.spaces.Box(-1, 1, (3,))},
    )
    agent = WorldModels(obs_spec(spaces[0]), act_spec(spaces[1]), config)
    torch.nn.init.constant_(agent.memory.out.bias[-1:], -100.0)  # no dream ends
    weights = torch.from_numpy(agent.evolution.candidates).repeat_interleave(config.stages.rollouts, 0)
    agent.dream.config = config.stages.replace(dream_length=20)
    start, begin = torch.randn(len(weights), config.stages.z), time.process_time()
    with torch.no_grad():
        agent.dream.play(weights, start)
    return 20 * len(weights) / (time.process_time() - begin)


def env_rate(step):
    """Return steps per second of CPU time with random actions."""
    rng, begin = np.random.default_rng(0), time.process_time()
    for _ in range(STEPS):
        step(rng.uniform(0, 1, 3).astype(np.float32) * (1, 1, 0.1))
    return STEPS / (time.process_time() - begin)


# ---------------------------------------------------------------------------
# CarRacing


def race(args):
    """Tell what a run of `--configs race` has reached, beside random actions; draw its curve."""
    chance = {limit: random_returns(args, limit) for limit in (400, 0)}
    whole = args.out.parent / f"{args.out.name}_whole"  # episodes as long as the task's own
    if not (args.finished or is_done(whole)):
        flags = f"--script eval_only --time_limit 0 --eval_episode_num {EPISODES} --from_checkpoint {args.out}"
        call(flags.split(), whole)
    found = {400: args.out, 0: whole}
    rows = []
    for limit, logdir in found.items():
        scores = final_scores(logdir) if (logdir / "scores.jsonl").exists() else []
        cells = (
            f"{mean:.0f} ± {error:.0f}" if n else MISSING for n, mean, error in map(summed, (chance[limit], scores))
        )
        rows.append([f"{limit} frames" if limit else "1,000 frames, the task's own", *cells])
    draw_race(args.out, chance[400])
    return markdown(("episodes of", "random actions", "best C"), rows)


def summed(scores):
    """Return the number of scores, their mean and its standard error."""
    return len(scores), *(mean_and_error(scores) if len(scores) > 1 else (float("nan"),) * 2)


def random_returns(args, limit):
    """Return the returns of EPISODES of random actions, played once and kept in a file."""
    path = args.out.parent / f"{args.out.name}_random_{limit}.json"
    if not path.exists():
        if args.finished:
            return []
        config = load_config(["--configs", "race", "--time_limit", str(limit)], CONFIGS)
        with contextlib.closing(make_envs(config, "eval", 1)) as envs:
            spec = act_spec(envs.act_space)
            evaluation = Evaluation(envs, spec, step_layout(envs.obs_space, spec), EPISODES, "sample")
            scores = [episode.score for episode in evaluation.play(Random(spec, derive_seed(config.seed, 3)))]
        atomic_write(path, lambda file: file.write(json.dumps(scores).encode()))
    return json.loads(path.read_text())


def draw_race(out, chance):
    """Draw the returns of all episodes of a run in the order that they were played, and the means that were scored."""
    plt = pyplot()
    episodes = [(row["step"], row["score"]) for row in lines(out / "scores.jsonl") if row["mode"] == "train"]
    scored = [(row["step"], row["score"]) for row in lines(out / "metrics.jsonl") if "score" in row]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.scatter(*zip(*episodes, strict=True), s=4, alpha=0.5, label="episodes of data and candidates")
    if scored:
        axes.plot(*zip(*scored, strict=True), color="black", drawstyle="steps-post", label="mean of the candidates")
    if chance:
        axes.axhline(float(np.mean(chance)), color="gray", linestyle=":", label="random actions")
    axes.set(xlabel="environment frames", ylabel="return of 400 frames")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend(fontsize=8)
    figure.savefig(f"{out}.png", dpi=130)


COMMANDS = {"dream": dream, "throughput": throughput, "race": race}

if __name__ == "__main__":
    sys.exit(main())
