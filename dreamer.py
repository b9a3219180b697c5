"""Train, evaluate and resume agents that learn in a world model.

    python3 dreamer.py --configs dmc_vision --task dmc_walker_walk --logdir ./logdir/walker

This file wires a run and holds its loop. What one update does is `Dreamer.loss` in agents/dreamer.py; the world model
and the behavior that it trains are in models.py. These three files are the algorithm.
"""

import contextlib
import errno
import functools
import gc
import os
import pathlib
import shlex
import signal
import sys
from types import SimpleNamespace

from training import installed

if __name__ == "__main__":
    installed.demand("dreamer.py")  # before the first package is imported
elif __name__ == "dreamer":
    installed.check_names()  # for load_agent, beside a user's own files

from tools import Lost, NonFiniteLoss, UserError, derive_seed, guard_output
from training.config import CONFIGS, beside, key_meant, load_config
from training.console import print_line
from training.distributed import Elsewhere, Ranks, check, check_same_place, joined, settle, share, speaks
from training.logdir import placed
from training.signals import Interrupted, given_up_if_stopped, signals_noted

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a disk that takes no more


def loop(run, agent, replay, collect, evaluate):
    """Act, store, learn, evaluate and save in turns, so that each agent step is followed by its share of updates.

    Args:
      run: Run, with the counters and clocks; agent: Agent; replay: Replay.
      collect: function (agent, mode) that acts once in every environment, stores it and returns the agent steps.
      evaluate: function that plays the episodes of an evaluation.
    """
    learn(run, agent, replay)  # what an interruption left to do, or pretraining on data that is given
    while run.going():
        with run.saving_on_error():
            if run.clocks["eval"](run.step):
                evaluate()
            run.agent_steps += collect(*run.collector())
        learn(run, agent, replay)
        run.serve()


def learn(run, agent, replay):
    """Make the updates that are due: floor(ratio * agent steps) in all."""
    while run.learning_due():
        with given_up_if_stopped(run):
            run.learned(agent.learn(replay))


def main(argv=None):
    """Run the command line; return the exit status."""
    config = None
    try:
        config = with_absolute_paths(load_config(sys.argv[1:] if argv is None else argv, CONFIGS))
        config = sized(config)
        if not config.eval_envs:  # no evaluation, then
            config = config.replace(eval_episode_num=0)
        check(config)
        from envs.names import check_task

        check_task(config, key_meant)  # a misspelt one need not wait for PyTorch, which takes seconds to import
        with contextlib.ExitStack() as stack:  # what is opened is closed at the end, whatever happens
            return (eval_only if config.script == "eval_only" else train)(config, stack)
    except UserError as error:
        print_line(f"dreamer.py: {error}") if speaks(error) else None
        return 2
    except Elsewhere:  # which says why
        return 1
    except Lost as error:
        return failed(config, error)
    except OSError as error:
        if error.errno not in FULL and not is_gone(error, config):
            raise
        return failed(config, f"--logdir {config.logdir}: {error.strerror}")
    except KeyboardInterrupt:
        failed(config, "ended at once") if config else print_line("dreamer.py: ended before it began")
        return 128 + signal.SIGINT


def with_absolute_paths(config):
    """Return the configuration with paths that stay the same where an environment changes the directory."""
    if not config.logdir:
        raise UserError("--logdir: expected a path, got nothing")
    keys = "offline_traindir", "from_checkpoint", "text.tokenizer", "text.embeddings"
    paths = {key: config[key] for key in keys}
    paths = {key: str(pathlib.Path(path).expanduser().absolute()) for key, path in paths.items() if path}
    return placed(config).replace(**paths)


def sized(config):
    """Return the configuration with `envs` as the number of all environments, those of actors elsewhere included."""
    remote, count = config.remote, config.remote.actors * config.remote.envs
    if not count or config.script != "train":
        return config
    if config.agent == "world_models":
        raise UserError("--remote.actors is not for --agent world_models: its candidates play at home, one by one")
    if "envs" in config.explicit and config.envs != count:
        raise UserError(f"--envs {config.envs}: with --remote.actors, --remote.envs says how many each of them has")
    return config.replace(envs=remote.actors * remote.envs)


def is_gone(error, config):
    """True if a file could not be written because the logdir, or a folder in it, is not there any more."""
    place = os.path.abspath(os.fsdecode(error.filename or ""))
    return error.errno == errno.ENOENT and pathlib.Path(place).is_relative_to(config.logdir)


def failed(config, why):
    """Say why a run cannot go on, and from what it could; return the exit status."""
    path = pathlib.Path(config.logdir) / "latest.pt"
    kept = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
    print_line(f"dreamer.py: {why}; {kept}")
    return 1


def train(config, stack):
    """Train until `steps` frames were seen or a signal came; go on from the checkpoint in the logdir."""
    from ops import collectives  # PyTorch takes seconds to import: a misspelt flag need not wait for it
    from training.run import open_logdir

    ranks = stack.enter_context(joined(config, collectives.start))
    with ranks.together():
        before = open_logdir(config, stack, ranks)
        if is_done(share(config, ranks), *before):
            return 0
        parts = wire(config, stack, *before, ranks)
    run = parts.run
    try:
        with signals_noted(parts.noted, run.out.acknowledge, run.out.compiles), contextlib.suppress(Interrupted):
            loop(run, parts.agent, parts.replay, parts.collect, parts.evaluate)
            finish(run, parts.evaluate)
    except NonFiniteLoss as error:
        return failed(config, error) if ranks.rank == 0 else 1
    stopped = run.stopped or parts.noted.stopped  # a second signal leaves no time to agree on the first
    return 128 + stopped if stopped else 0


def is_done(config, saved, changed):
    """Say so and return True if a checkpoint is that of a run at its end."""
    from training.console import is_printed
    from training.logdir import changed_line, finished

    if not saved or not finished(config, saved):
        return False
    step = saved["counters"]["agent_steps"] * config.action_repeat
    why = f"already finished at step {step:,}: nothing to do (raise --steps, or give another --logdir)"
    for line in (changed_line(changed), f"{config.logdir}: {why}"):
        if line and is_printed("info", config.log_level):
            print_line(line)
    return True


def wire(config, stack, saved=None, changed=(), ranks=None):
    """Make environments, agent and replay, filled from what the logdir holds, and what `loop` is called with.

    Args:
      saved, changed: what `training.run.open_logdir` found there; ranks: the Ranks that share the run, None for one.
    Returns: namespace of run, agent, replay, collect, evaluate, envs, and noted, what signals set attributes of;
      `stack` closes what is opened.
    """
    from envs import opengl
    from modalities import describe
    from training import evaluation, machine
    from training.logdir import changed_line
    from training.rng import undisturbed
    from training.startup import start_lines

    ranks = ranks or Ranks()
    own, ended, device = share(config, ranks), [], machine.prepare(config)
    opengl.draw_beside(device)
    envs = open_envs(own, stack, saved["counters"]["agent_steps"] if saved else 0, ranks.rank)
    spaces = envs.collecting or envs.evaluating()
    run, specs, layout = make_run(config, spaces, saved, ranks, device)
    agent, replay, noted = run.agent, run.replay, run if ranks.count == 1 else ranks
    run.spaces, run.restarts = spaces.own, envs.restarts
    out = run.open(stack)
    about = describe(spaces.obs_space)
    for line in [*start_lines(run, specs, about, spaces.left_out, device), changed_line(dict(changed))]:
        out.say("info", line) if line else None
    heard = run.finished if ranks.count == 1 else ended.append
    driver = make_driver(run, envs.collecting, specs, layout, heard) if envs.collecting else None
    settle(run)
    beat = getattr(driver, "beat", lambda: True)  # an actor hears that the learner is there

    def collect(agent, mode):
        ended.clear()
        if not driver:  # train_offline: as many updates as the frames would bring
            return settle(run, own.envs)
        steps = driver.step(agent, mode)
        out.watch(driver.lengths, envs.collecting.longest)
        out.say_restarts(envs.collecting)
        return settle(run, steps, ended)

    def evaluate(film=False):
        if not config.eval_episode_num or (film and ranks.rank):
            return
        with undisturbed({**agent.generators, "replay": replay.rng}):
            played, going = envs.evaluating(), lambda: not noted.stopped and beat()
            if film:
                with out.stage("filming"):
                    evaluation.record_film(agent, played, specs[1], config.eval_mode, out, run.step)
                return
            with out.stage("evaluating"):
                score = evaluation.evaluate(agent, played, own, out, specs, run.step, going, replay, ranks)
        run.keeper.evaluated(score)
        settle(run)

    return SimpleNamespace(
        run=run, agent=agent, replay=replay, collect=collect, evaluate=evaluate, envs=envs, noted=noted
    )


def make_driver(run, envs, specs, layout, heard):
    """Return what collects: its `step(agent, mode)` returns the agent steps; `lengths` are those of episodes so far.

    Args:
      envs: to collect in; specs: of observations and actions; layout: {key: (shape, dtype)} of a stored step.
      heard: function of an Episode that ended.
    """
    from training.driver import Driver

    listeners = {"on_step": [run.recorder], "on_episode": [heard]}
    if run.config.collect == "async":
        from agents import make_agent

        envs.begin(run, make_agent, specs, layout, *listeners.values())
        run.extras, run.ending = envs.metrics, envs.stop
        return envs
    if not run.config.remote.actors:
        return Driver(envs, specs[1], layout, **listeners)
    from agents.actor import weights_of
    from training.remote import Collector

    collector = Collector(
        envs,
        specs[1],
        layout,
        **listeners,
        remote=run.config.remote,
        learner=run.agent,
        weights=functools.partial(weights_of, run.agent),
        updates=lambda: run.updates,
        going=lambda: not run.stopped,
    )
    run.extras, run.ending = collector.gauges, lambda: collector.drain() if run.stopped else 0
    return collector


def make_run(config, spaces, saved, ranks, device):
    """Make agent and replay for the spaces of environments, and restore them.

    Returns: the Run, the ObsSpec and the ActionSpec, the layout of a stored step.
    """
    from agents import make_agent
    from agents.random import Random
    from modalities import obs_spec
    from ops import collectives
    from replay.sampling import make_replay
    from specs import act_spec, step_layout
    from training.rng import seed_everything
    from training.run import Run, episode_paths

    own = share(config, ranks)
    specs = obs_spec(spaces.obs_space), act_spec(spaces.act_space)
    agent, layout, paths = make_agent(own, *specs), step_layout(spaces.obs_space, specs[1]), episode_paths(config)
    if ranks.rank:  # environments of this process may draw from the global generators
        seed_everything(derive_seed(config.seed, 8, ranks.rank))
    replay = make_replay(own, layout, agent, paths, device)
    random = Random(specs[1], derive_seed(config.seed, 3, *collectives.place()))
    run = Run(config, agent, replay, random, ranks)
    run.restore(saved, [*paths[0], *paths[1]])  # before anything is written: it may find that nothing fits
    check_same_place(ranks, config.logdir, (run.agent_steps, run.updates))
    collectives.broadcast_([*agent.nets.state_dict().values()] if hasattr(agent, "nets") else [])
    return run, specs, layout


def finish(run, evaluate):
    """Write the final log and checkpoint; evaluate and film unless interrupted."""
    if run.ending:
        if run.stopped:
            run.save()  # what collects by itself may have died of the same signal, and take this process along
        run.agent_steps += run.ending()
    run.log()
    stage = run.clock.stage()
    if stage and not (run.stopped or run.clock.finished()):
        run.out.say("warning", f"the last frame came at {stage[1]:.0%} of {stage[0]}: raise --steps to go on from here")
    if not run.stopped:
        run.clocks["eval"](run.step)  # what follows: a run that is extended does not evaluate here again
    run.save_all()  # before anything that an environment could break
    if not run.stopped:
        evaluate()
    if not run.stopped:
        evaluate(film=True)
        folder = run.logdir.resolve().parent  # from where TensorBoard calls the run by its name
        run.out.say("info", f"curves: {sys.executable} -m tensorboard.main --logdir {shlex.quote(str(folder))}")


def open_envs(config, stack, behind, rank=0):
    """Make environments; `stack` closes them.

    Those to evaluate in are made at once if they are needed before the end. Else they take the place of those to
    collect in, when they are asked for and in no greater number: of some environments there can be one only.

    behind: agent steps that the run has behind it; rank: of the process, as many of whose own come before its
      environments as there are ranks before it.
    Returns: namespace of collecting, the Envs or None for train_offline; evaluating, a function that returns Envs; and
      restarts, a function that counts those of both.
    """
    from envs import make_envs
    from envs.checks import check_same
    from training.async_learner import RealTime

    made = []

    def make(mode, count, behind=0):
        if config.collect == "async" and mode == "train":
            made.append(RealTime(functools.partial(make_envs, config, mode, count), behind, config))
        elif config.remote.actors and mode == "train":
            from agents.actor import open_fleet

            made.append(open_fleet(config, behind, stack))
        else:
            made.append(make_envs(config, mode, count, behind, rank * count))
        stack.callback(close_envs, config, made[-1])
        return made[-1]

    collecting = make("train", config.envs, behind) if config.script == "train" else None
    count = min(config.eval_envs, config.eval_episode_num)
    midway = count and config.eval_every > 0

    @functools.cache
    def evaluating():
        if collecting and not midway:
            close_envs(config, collecting)
            gc.collect()
        envs = make("eval", max(1, count if midway else min(count, config.envs)))
        spaces = ((each.obs_space, each.act_space) for each in (made[0], envs))
        check_same(*spaces, "the evaluation environment")
        return envs

    if midway or not collecting:
        evaluating()
    restarts = lambda: sum(envs.restarts for envs in made)  # noqa: E731
    return SimpleNamespace(collecting=collecting, evaluating=evaluating, restarts=restarts)


def close_envs(config, envs):
    """Close environments; warn of those that fail at it."""
    from training.outputs import warn_at

    envs.close()
    for event in envs.events:
        warn_at(config.log_level, event)
    envs.events.clear()


def eval_only(config, stack):
    """Evaluate the agent of --from_checkpoint, or else of the logdir, as the config.yaml beside it describes it."""
    from agents import make_agent
    from envs import make_envs, opengl
    from modalities import describe, obs_spec
    from specs import act_spec
    from training import evaluation, machine
    from training.checkpoint import checkpoint_file, load_agent_state, load_checkpoint
    from training.foreign import check_foreign
    from training.logdir import save_config
    from training.outputs import Outputs
    from training.startup import evaluation_lines

    path = checkpoint_file(config.from_checkpoint or config.logdir)
    if not config.from_checkpoint and not path.is_file():
        raise UserError("--script eval_only needs a --logdir with latest.pt, or --from_checkpoint")
    config = beside(config, path.parent / "config.yaml")
    check_foreign(config, path.parent, config.explicit)
    if not min(config.eval_episode_num, config.eval_envs):
        raise UserError("--script eval_only needs an --eval_episode_num of at least 1 and an --eval_envs of at least 1")
    device = machine.prepare(config)
    opengl.draw_beside(device)
    saved = load_checkpoint(path)
    step, ending = saved["counters"]["agent_steps"] * config.action_repeat, SimpleNamespace(stopped=None)
    envs = make_envs(config, "eval", min(config.eval_envs, config.eval_episode_num))
    stack.callback(close_envs, config, envs)
    specs = obs_spec(envs.obs_space), act_spec(envs.act_space)
    agent = make_agent(config, *specs)
    load_agent_state(agent, saved, config)
    try:
        out = Outputs(config, 0, 0)  # at 0 it leaves the curves of a run alone
        out.progress.step = step
        stack.callback(out.close)
        (out.logdir / "eval_eps").mkdir(exist_ok=True)
        if not (out.logdir / "config.yaml").exists():
            save_config(config, out.logdir)
    except OSError as error:
        raise UserError(f"--logdir {config.logdir}: {error.strerror}") from None
    for line in evaluation_lines(config, agent, specs, describe(envs.obs_space), envs.left_out, device, (path, step)):
        out.say("info", line)
    with signals_noted(ending, out.acknowledge), contextlib.suppress(Interrupted), out.stage("evaluating"):
        evaluation.evaluate(agent, envs, config, out, specs, step, lambda: not ending.stopped)
    return 128 + ending.stopped if ending.stopped else 0


def load_agent(path, device="auto"):
    """Load a trained agent as its checkpoint and the config.yaml beside it describe it; no environment is needed.

        agent, state = load_agent("logdir/run"), None
        action, state = agent.act(obs, state)  # both as the environment has them; see agents.policy.Policy.act

    Args:
      path: a checkpoint or its logdir; device: auto, cpu, cuda or cuda:N.
    Returns: a Policy. Raises UserError if it cannot be loaded or is of another size than its config.yaml says.
    """
    from agents.policy import load_policy

    return load_policy(path, device)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once until there is something to save
    guard_output()
    sys.exit(main())
