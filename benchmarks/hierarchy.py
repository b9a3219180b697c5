"""Measure PPO in imagination, a worker alone, and a manager with its worker.

python3 benchmarks/hierarchy.py cartpole --out logdir/ppo --write docs/motivation.md
python3 benchmarks/hierarchy.py worker --out logdir/worker --write docs/motivation.md
python3 benchmarks/hierarchy.py reach --out logdir/reach --write docs/motivation.md

Finished runs are left alone, others begin or go on; one process at a time. Prints a table, and puts it between its
markers in a page.
"""

import contextlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/hierarchy.py")  # before the first package is imported

import numpy as np
import torch
import torch.nn.functional as F

from agents import make_agent
from agents.random import Random
from benchmarks.family import MISSING, eval_curve, final_scores, is_done, lines, run_all
from benchmarks.pages import markdown, publish
from envs import make_envs
from modalities import obs_spec
from ops.distributions import one_hot
from ops.random import drawing_from, rand
from replay.sampling import make_replay
from specs import act_spec, step_layout
from tools import Parser, derive_seed
from training.checkpoint import atomic_save
from training.config import CONFIGS, load_config
from training.driver import Driver

CARTPOLE = "--behavior ppo --video_pred_log false"
SOLVED = 195.0  # mean return of the last evaluation
WORKER = """--task dummy_pixels --size 16 16 --encoder.depth 4 --decoder.depth 4 --imag_horizon 8 --train_ratio 0
--compile true --replay_window uniform --replay_context false
--hierarchy.units 64 --hierarchy.layers 2 --hierarchy.goal_lr 1e-3 --loss_scales.rec 10"""
STEPS, UPDATES, PIECE = 2000, 2000, 200  # agent steps of random acting, updates, and those between two measurements
SAMPLES = 16  # batches that goals are drawn from
# An explorer collects, until the end: alone a hierarchy found a third of the maze. The manager's returns are divided by
# their range from a tenth on: before there is a reward they are noise, which would else choose its goals for good.
# Episodes begin in one place, where the modes of a policy would take one way only: evaluations draw actions.
REACH = """--task dummy_maze --steps 14000 --train_ratio 64 --eval_every 2000 --eval_episode_num 20 --eval_mode sample
--video_pred_log false --horizon 100 --loss_scales.rec 10 --log_every 1000 --pretrain 300 --compile true
--actor.entropy 3e-3 --expl_behavior plan2explore --disag_target embed --disag_log true --disag_layers 2
--disag_units 64 --disag_models 5"""
REACHERS = {  # name -> its presets, its own flags, and how many seeds
    "manager and worker": (
        "quickstart hierarchical",
        """--hierarchy.units 64 --hierarchy.layers 2 --hierarchy.goal_lr 1e-3 --hierarchy.expl_scale 0
        --ppo.entropy_target 0.3 --return_norm.limit 0.1""",
        3,
    ),
    "one actor": ("quickstart", "--imag_horizon 16", 1),
}
REACHED = 0.5  # mean return of the last evaluation's episodes


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--flags", default="", help="more flags of dreamer.py for every run, such as another --task")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    return publish(parser, argv, lambda args: COMMANDS[args.command](args), processes=1)


def run(args, presets, flags, name, count):
    """Run dreamer.py for each seed that is not finished; return the logdirs of those that are."""
    logdirs = [args.out / f"{name}_{seed}" for seed in range(count)]
    words = ["--configs", *presets.split(), *flags.split(), *args.flags.split()]
    run_all({logdir: [*words, "--seed", str(seed)] for seed, logdir in enumerate(logdirs)}, args)
    return list(filter(is_done, logdirs))


def row(name, logdirs, least):
    """Return a line of a table: the last evaluation of each run, and in how many of them it is good enough."""
    finals = [float(np.mean(final_scores(logdir))) for logdir in logdirs]
    first = [next((step for step, score in zip(*eval_curve(d), strict=True) if score >= least), None) for d in logdirs]
    if not finals:
        return [name, *[MISSING] * 3]
    told = ", ".join("never" if step is None else f"{step:,}" for step in first)
    enough = sum(score >= least for score in finals)
    return [name, ", ".join(f"{score:.3g}" for score in finals), told, f"{enough} of {len(finals)}"]


def cartpole(args):
    """CartPole by flat PPO, with the preset quickstart."""
    done = run(args, "quickstart", CARTPOLE, "ppo", args.seeds)
    head = ("learned by", "last evaluation, by seed", f"frames until {SOLVED:.0f}", f"at least {SOLVED:.0f}")
    return markdown(head, [row("PPO", done, SOLVED)])


def reach(args):
    """A maze with one reward in the far corner: manager and worker, and DreamerV3's one actor beside them."""
    rows = []
    for name, (presets, flags, seeds) in REACHERS.items():
        done = run(args, presets, f"{REACH} {flags}", name.replace(" ", "_"), min(seeds, args.seeds))
        rows.append(row(name, done, REACHED))
    head = ("learned by", "last evaluation, by seed", f"frames until {REACHED}", f"at least {REACHED}")
    return markdown(head, rows)


# ---------------------------------------------------------------------------
# The worker alone


def worker(args):
    """Return a table of how near a worker and a random one come to replayed states within the time of a goal."""
    rows = []
    for seed in range(args.seeds):
        found = alone(args, seed)
        if found:
            start, end = found[0], found[-1]
            rows.append([str(seed), *(f"{value:.3f}" for value in (start["random"], end["random"], end["worker"]))])
            rows[-1] += [f"{end['worker'] / end['random']:.2f}", f"{end['success']:.2f}", f"{end['updates']:,}"]
    head = ("seed", "random, at first", "random", "worker", "worker / random", "max-cosine > 0.7", "updates")
    return f"1 - cosine to the goal after its 8 steps:\n\n{markdown(head, rows)}"


def alone(args, seed):
    """Let a worker learn from goals that are states of the replay; return [{name: number}] of its measurements."""
    folder = args.out / f"worker_{seed}"
    saved, told = folder / "latest.pt", folder / "measured.jsonl"
    flags = ["--configs", "quickstart", "hierarchical", *WORKER.split(), "--seed", str(seed)]
    config = load_config([*flags, *args.flags.split(), "--logdir", str(folder)], CONFIGS)
    if args.finished:
        return lines(told) if told.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    agent, replay = collected(config)
    done = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        agent.load_state_dict(state["agent"])
        agent.generators["learn"].set_state(state["learn"])
        done = state["updates"]
    found = [line for line in (lines(told) if told.exists() else []) if line["updates"] <= done]
    while done < UPDATES or not found:
        for _ in range(PIECE if found else 0):
            with drawing_from(agent.generators["learn"]):
                agent.update(*agent.batch(replay.sample(agent.batch_size)[0]))
            done += 1
        found.append({"updates": done, **nearness(agent, replay)})
        told.write_text("".join(json.dumps(line) + "\n" for line in found))
        learn = agent.generators["learn"].get_state()
        atomic_save(saved, {"agent": agent.state_dict(), "learn": learn, "updates": done})
        print(json.dumps(found[-1]), flush=True)
    return found


def collected(config):
    """Return an agent whose manager chooses states of the batch, and a replay of STEPS random steps."""
    with contextlib.closing(make_envs(config, "train", 1)) as envs:
        specs = obs_spec(envs.obs_space), act_spec(envs.act_space)
        agent, layout = make_agent(config, *specs), step_layout(envs.obs_space, specs[1])
        replay = make_replay(config, layout, agent, ([], []), agent.device)
        driver = Driver(envs, specs[1], layout, on_step=[replay.add])
        actor = Random(specs[1], derive_seed(config.seed, 3))
        for _ in range(STEPS):
            driver.step(actor, "sample")
    behavior = agent.behavior
    behavior.manager.policy = lambda deter, stoch, noise: elsewhere(behavior, deter)
    return agent, replay


def elsewhere(behavior, deter):
    """Return the codes (N, G C) of recurrent states (N, D) in another order."""
    order = rand((len(deter),), deter.device).argsort()
    noise = rand((len(deter), behavior.goals.shape[0]), deter.device)
    return behavior.goals.encode(deter[order].float()).sample(noise).flatten(-2)


def anything(count, size):
    """Draw one-hot actions (N, A)."""
    return one_hot(rand((count, size)).argmax(-1), size)


@torch.no_grad()
def nearness(agent, replay):
    """Return 1 - cosine to the goal at the end of its time, {worker, random}, and the share of successes."""
    behavior, world, found = agent.behavior, agent.world, {"worker": [], "random": []}
    move, generator = behavior.move, torch.Generator().manual_seed(0)
    size = agent.act_spec.size  # of one discrete action
    for _ in range(SAMPLES):
        batch, state = agent.batch(replay.sample(agent.batch_size, fresh=False)[0])
        batch = world.prepare({**batch, "action": agent.act_spec.join(batch)})
        with drawing_from(generator):
            states, _ = world.rssm.observe(world.encode(batch), batch["action"], batch["is_first"], state)
            for name in found:
                behavior.move = move if name == "worker" else lambda deter, *_: anything(len(deter), size)
                plan = behavior.rollout(world, states)
                goal, end, usual = plan.goals[0], plan.states.deter[behavior.every].float(), behavior.goals.usual
                cosine = F.cosine_similarity(goal - usual, end - usual, -1)
                found[name].append((cosine, behavior.goals.near(goal, end)))
    behavior.move = move
    cosines = {name: 1 - float(torch.cat([cosine for cosine, _ in pairs]).mean()) for name, pairs in found.items()}
    return {**cosines, "success": float((torch.cat([near for _, near in found["worker"]]) > 0.7).float().mean())}


COMMANDS = {"cartpole": cartpole, "worker": worker, "reach": reach}

if __name__ == "__main__":
    sys.exit(main())
