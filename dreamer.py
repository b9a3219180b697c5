"""Train, evaluate and resume agents of the Dreamer family.

    python3 dreamer.py --configs dmc_vision --task dmc_walker_walk --logdir ./logdir/walker

Read from top to bottom: a run makes its environments, its replay and its agent, and then alternates acting,
learning, evaluating and saving until it has seen `steps` environment frames.
"""

import contextlib
import errno
import functools
import pathlib
import signal
import sys
import time

import numpy as np
import torch

from agents.dreamer import Dreamer
from envs import make_envs
from exploration import Random
from replay.episodes import EpisodeWriter, finite, length_of, step_layout, stored_step
from replay.sampling import Replay, resident, room_for_run
from tools import (
    Every,
    Rates,
    Ratio,
    UserError,
    atomic_save,
    derive_seed,
    get_rng_state,
    hold,
    seed_everything,
    set_rng_state,
)
from training.checkpoint import (  # noqa: F401 (load_agent is for users)
    SAME,
    check_same,
    checkpoint_file,
    load_agent,
    load_checkpoint,
    load_latents,
)
from training.config import CONFIGS, load_config
from training.logger import Logger, Metrics, NonFiniteLoss, Progress
from training.machine import check_compiler, choose_device, choose_dtype, prepare_cpu
from training.videos import film, visible, write_gif, write_mp4

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a disk that takes no more
LEVELS = ("debug", "info", "warning", "error")


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        config = load_config(sys.argv[1:] if argv is None else argv, CONFIGS)
        return Run(config).main()
    except UserError as error:
        print(f"dreamer.py: {error}", file=sys.stderr)
        return 2


def keeps_generators(method):
    """Decorates a method of `Run`: learning draws the same random numbers whether or not it was called."""

    @functools.wraps(method)
    def wrapped(self):
        generator = self.replay.rng.bit_generator
        states = get_rng_state(), generator.state
        try:
            return method(self)
        finally:
            set_rng_state(states[0])
            generator.state = states[1]

    return wrapped


class Run:
    """One run: everything it needs, its counters, and the loop.

    Args:
      config: the whole configuration.
    """

    def __init__(self, config):
        if not config.logdir:
            raise UserError("--logdir: expected a path, got nothing")
        self.config = config
        self.logdir = pathlib.Path(config.logdir).expanduser()
        self.device = choose_device(config.device)
        self.prepare_machine()
        self.stopped = None
        self.closing = []
        try:
            self.build()
        except BaseException:
            self.close()
            raise

    def prepare_machine(self):
        prepare_cpu(self.config.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.config.precision != "32"
        seed_everything(self.config.seed)

    # -- environments, replay, agent

    def build(self):
        config, path = self.config, self.logdir / "latest.pt"
        held = self.hold_logdir()
        other = config.script == "eval_only" and config.from_checkpoint  # what is asked for, not what is there
        saved = load_checkpoint(path) if path.exists() and not other else None
        self.envs = self.open_envs("train", config.envs, saved["counters"]["agent_steps"] if saved else 0)
        self.eval_envs = self.open_envs("eval", min(config.eval_envs, config.eval_episode_num))
        self.agent = Dreamer(
            self.envs.obs_space, self.envs.act_space, config, self.device, choose_dtype(config.precision, self.device)
        )
        if config.compile:
            check_compiler()
            self.agent.compile()
        self.random = Random(self.agent.act_spec, derive_seed(config.seed, 3))
        layout = step_layout(self.envs.obs_space, self.agent.act_spec)
        latent, capacity = self.agent.latent_size, self.capacity(layout)
        self.replay = Replay(
            layout,
            latent,
            config.envs,
            capacity,
            config.batch_length,
            derive_seed(config.seed, 4),
            config.replay_window,
            resident(self.device, layout, latent, capacity),
        )
        self.obs, self.memory = None, None
        self.action = self.no_action(config.envs)
        self.agent_steps = self.updates = self.episodes = 0
        self.returns, self.last_return = np.zeros(config.envs), None
        self.metrics = Metrics(self.device)
        updates_per_step = config.train_ratio / (config.batch_size * config.batch_length)
        self.ratio = Ratio(updates_per_step, config.train_burst, config.pretrain)
        self.clocks = {
            "ratio": self.ratio,
            "log": Every(config.log_every),
            "eval": Every(config.eval_every, first=False),
            "save": Every(config.save_every, first=False),
        }
        offline = config.script == "train_offline" or config.offline_traindir
        self.pretraining = self.ratio(0) if offline else 0  # no prefill: the clock starts at once
        self.restore(saved)  # before anything is written: it may find that nothing fits
        try:
            reached = self.step if config.script != "eval_only" else 0  # it leaves the curves of a run alone
            self.logger = Logger(self.logdir, reached, config.logger, config.to_dict())
            self.logdir.mkdir(parents=True, exist_ok=True)
            if not held:  # it is new
                self.hold_logdir()
            if config.script != "eval_only" or not (self.logdir / "config.yaml").exists():
                config.save(self.logdir / "config.yaml")
            self.writer = EpisodeWriter(self.logdir / "train_eps", config.envs, config.dataset_size)
            self.eval_writer = EpisodeWriter(self.logdir / "eval_eps", len(self.eval_envs), config.dataset_size)
        except OSError as error:
            raise UserError(f"--logdir {config.logdir}: {error.strerror}") from None
        self.rates = Rates(fps=self.step, updates_per_second=self.updates)
        self.progress = Progress(config.steps, step=self.step, updates=self.updates)
        self.closing += [self.progress.close, self.logger.close]

    def hold_logdir(self):
        """Keep other runs from the logdir, if it is there; whether it is."""
        if self.config.script == "eval_only" or not self.logdir.is_dir():
            return False
        self.closing.append(hold(self.logdir))
        return True

    def open_envs(self, mode, count, behind=0):
        envs = make_envs(self.config, mode, count, behind)
        self.closing.append(envs.close)
        return envs

    def no_action(self, count):
        """{key: (count, width)} zeros: what led to the first observations."""
        return {key: np.zeros((count, width), np.float32) for key, width in self.agent.act_spec.widths.items()}

    def capacity(self, layout):
        """Steps of the rings: those of the whole run and of offline_traindir if they are fewer than dataset_size."""
        own, offline = ([length_of(path) for path in paths] for paths in (self.own_paths(), self.offline_paths()))
        needed = max(room_for_run(self.config, layout), sum(own)) + sum(offline)
        return min(self.config.dataset_size, needed) if all(own + offline) else self.config.dataset_size

    def own_paths(self):
        """The episode files that the run has written, oldest first."""
        return sorted((self.logdir / "train_eps").glob("*.npz"))

    def offline_paths(self):
        """The episode files of offline_traindir, oldest first."""
        folder = pathlib.Path(self.config.offline_traindir).expanduser()
        if not folder.is_dir():
            raise UserError(f"--offline_traindir {folder}: no such directory")
        return sorted(folder.glob("*.npz")) if self.config.offline_traindir else []

    @property
    def step(self):
        """Environment frames so far, action repeat included."""
        return self.agent_steps * self.config.action_repeat

    # -- the loop

    def main(self):
        """Do what `script` says; returns the exit status."""
        handlers = {sign: signal.signal(sign, self.stop) for sign in (signal.SIGINT, signal.SIGTERM)}
        try:
            {"train": self.train, "train_offline": self.train_offline, "eval_only": self.evaluate}[self.config.script]()
        except NonFiniteLoss as error:
            return self.failed(error)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return self.failed(f"--logdir {self.config.logdir}: {error.strerror}")
        finally:
            for sign, handler in handlers.items():
                signal.signal(sign, handler)
            self.close()
        return 128 + self.stopped if self.stopped else 0

    def failed(self, why):
        """Say why the run cannot go on, and from what it could; returns the exit status."""
        path = self.logdir / "latest.pt"
        kept = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        print(f"dreamer.py: {why}; {kept}", file=sys.stderr)
        return 1

    def stop(self, number, frame):
        """Signal handler: end after the step in hand, with a checkpoint. A second signal ends at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = number

    def close(self):
        while self.closing:
            self.closing.pop()()

    def train(self):
        """Act and learn in turns, so that each agent step is followed by its exact share of updates."""
        self.pretrain()
        while self.running():
            with self.kept():
                if self.clocks["eval"](self.step):
                    self.evaluate()
                self.collect()
            if self.filled():
                for _ in range(self.ratio(self.agent_steps)):
                    self.update()
            self.housekeeping()
        self.finish()

    def train_offline(self):
        """Learn from the replay alone, as many updates as `steps` frames would bring."""
        self.pretrain()
        while self.running():
            with self.kept():
                if self.clocks["eval"](self.step):
                    self.evaluate()
            self.agent_steps += self.config.envs
            for _ in range(self.ratio(self.agent_steps)):
                self.update()
            self.housekeeping()
        self.finish()

    @contextlib.contextmanager
    def kept(self):
        """What environments break in here costs no more than their step in hand."""
        try:
            yield
        except Exception:
            self.keep()
            raise

    def pretrain(self):
        """The updates that `pretrain` asks for where there is no prefill to make them after."""
        while self.updates < self.pretraining and not self.stopped:
            self.update()
            self.housekeeping()

    def running(self):
        return self.step < self.config.steps and not self.stopped

    def filled(self):
        """Whether enough was collected to learn from."""
        enough = self.agent_steps >= self.config.prefill or self.config.offline_traindir
        return enough and self.replay.ready()

    def housekeeping(self):
        if self.speaks("info"):
            self.progress.update(self.step, self.updates, self.last_return)
        if self.clocks["log"](self.step):
            self.log()
        if self.clocks["save"](self.step):
            self.save()

    def finish(self):
        """What remains when the last frame was seen, or a signal came."""
        self.log()
        if not self.stopped:
            self.clocks["eval"](self.step)  # what follows: a run that is extended does not evaluate here again
        self.keep()  # before anything that an environment could break
        if not self.stopped:
            self.evaluate()
        if not self.stopped:
            self.record_video()
            self.say("info", f"curves: {sys.executable} -m tensorboard.main --logdir {self.logdir}")

    def keep(self):
        """Save all there is, unfinished episodes included."""
        for index in range(self.config.envs):
            self.close_episode(index, self.writer.flush(index))
        self.save()

    # -- acting

    def collect(self):
        """One step in every environment; steps and their latents go to the replay and, in episodes, to disk.

        The environments act on while the agent learns: what they come to is received at the next call.
        """
        self.obs = self.envs.reset() if self.obs is None else self.envs.receive()
        self.report_restarts(self.envs)
        if self.filled() and not (self.exploring() and self.config.expl_behavior == "random"):
            actions, self.memory = self.agent.act(self.obs, self.memory, "explore" if self.exploring() else "noisy")
            latents = self.agent.latents(self.memory)
        else:
            actions, self.memory = self.random.act(self.obs)
            latents = [None] * len(self.envs)
        for index in range(len(self.envs)):
            self.add_step(index, latents[index])
        self.action = actions
        self.agent_steps += int((~self.obs["is_last"]).sum())
        self.envs.send(actions)

    def exploring(self):
        """Whether it is still for `expl_behavior` to collect."""
        return not self.config.expl_until or self.step < self.config.expl_until

    def add_step(self, index, latent):
        """Store the current step of one environment: its observation and the action that led to it."""
        step = stored_step(self.replay.layout, self.obs, self.action, index)
        for key, value in step.items():
            if not finite(value):
                raise UserError(f"environment {index} at frame {self.step}: {key} is not finite: {value}")
        if step["is_first"]:  # what is unfinished then was cut off by the end of its worker
            self.close_episode(index, self.writer.flush(index))
        self.replay.add(index, step, latent)
        file = self.writer.add(index, step)
        self.returns[index] = step["reward"] + self.returns[index] * ~step["is_first"]
        if file:
            self.episodes += 1
            self.close_episode(index, file)
            self.report_episode("train", self.returns[index], file[1], self.obs, index)
            self.last_return = self.returns[index]

    def close_episode(self, index, file):
        if file:
            self.replay.close_episode(index, *file)

    def report_restarts(self, envs):
        """Warn of environments that had to be restarted since the last call."""
        for event in envs.events:
            self.say("warning", event)
        envs.events.clear()

    def report_episode(self, mode, score, length, obs, index):
        """Log a finished episode of `length` stored steps; its length in metrics counts the actions."""
        extra = {key: float(value[index]) for key, value in obs.items() if key.startswith("log_")}
        self.logger.score(self.step, mode, float(score), length - 1, **extra)
        self.say("debug", f"step {self.step:,}: {mode} episode of {length - 1} steps, return {score:.1f}")
        if mode == "train":
            scalars = {"train_return": score, "train_length": length - 1, "train_episodes": self.episodes}
            self.logger.scalars({**scalars, **extra}, self.step)

    # -- learning

    def update(self):
        """One gradient step on a batch from the replay, and its fresh latents back into the replay."""
        batch, places = self.replay.sample(self.config.batch_size)
        states, metrics = self.agent.update(*self.agent.batch(batch))
        if self.replay.context:
            self.replay.refresh(places, *self.agent.compress(states))
        self.metrics.add(metrics, self.step)
        self.updates += 1

    # -- evaluating

    @keeps_generators
    def evaluate(self):
        """Play `eval_episode_num` episodes in environments of their own, and log their returns."""
        envs, config = self.eval_envs, self.config
        quota = np.array([len(part) for part in np.array_split(np.arange(config.eval_episode_num), len(envs))])
        scores, lengths, done = [], [], np.zeros(len(envs), int)
        frames = {key: [] for key in self.agent.obs_spec.images}  # of the first environment's first episode
        obs, memory, returns = envs.reset(), None, np.zeros(len(envs))
        actions = self.no_action(len(envs))
        while (done < quota).any() and not self.stopped:
            for index in np.flatnonzero(done < quota):
                step = stored_step(self.replay.layout, obs, actions, index)
                returns[index] = step["reward"] + returns[index] * ~step["is_first"]
                file = self.eval_writer.add(index, step)
                if file:
                    scores.append(float(returns[index]))
                    lengths.append(file[1] - 1)
                    done[index] += 1
                    self.report_episode("eval", returns[index], file[1], obs, index)
            for key, images in frames.items() if done[0] == 0 else ():
                images.append(obs[key][0])
            actions, memory = self.agent.act(obs, memory, config.eval_mode)
            obs = envs.step(actions)
            self.report_restarts(envs)
        if not scores:
            return
        result = {"eval_return": np.mean(scores), "eval_length": np.mean(lengths), "eval_episodes": len(scores)}
        self.logger.scalars(result, self.step)
        self.log_videos(frames)
        self.logger.flush()
        self.say("info", f"step {self.step:,}: eval_return {np.mean(scores):.1f} over {len(scores)} episodes")

    def log_videos(self, frames):
        """Videos of an evaluation: its first episode, {image key: [(H, W, C)]}, and predictions of replayed sequences.

        These are open-loop: truth | model | error, also as GIFs under openloop/<key>/.
        """
        if not self.config.video_pred_log or not frames:
            return
        start, stack = time.monotonic(), self.config.frame_stack
        for key, images in frames.items():
            self.logger.video(f"eval_policy/{key}", visible(np.stack(images)[:500], stack), self.step, fps=20)
        if self.replay.ready():
            batch, _ = self.replay.sample(min(6, self.config.batch_size), fresh=False)
            for key, video in self.agent.open_loop(*self.agent.batch(batch)).items():
                video = visible(video, stack)
                self.logger.video(f"openloop/{key}", video, self.step, fps=10)
                write_gif(self.logdir / "openloop" / key / f"{self.step:09d}.gif", video, fps=10)
        self.logger.scalars({"video_seconds": time.monotonic() - start}, self.step)

    @keeps_generators
    def record_video(self):
        """Play one episode on film, if the environment can be filmed: logdir/videos/<step>.mp4."""
        path = self.logdir / "videos" / f"{self.step:09d}.mp4"
        try:
            frames = film(self.eval_envs, lambda obs, memory: self.agent.act(obs, memory, self.config.eval_mode))
        except UserError as error:
            self.say("info", f"no video: {error}")
            return
        write_mp4(path, frames, fps=30)
        self.say("info", f"video: {path}")

    # -- logging and saving

    def speaks(self, level):
        """Whether messages of a level are printed."""
        return LEVELS.index(level) >= LEVELS.index(self.config.log_level)

    def say(self, level, text):
        """Print a line above the progress line, warnings to stderr by their name."""
        if not self.speaks(level):
            return
        if level == "warning":
            print(f"dreamer.py: warning: {text}", file=sys.stderr)
        else:
            self.progress.message(text)

    def log(self):
        if self.agent_steps > self.config.prefill and not self.replay.ready():
            what = "an episode" if self.config.replay_window.startswith("episode") else "what an environment gave"
            need = f"--batch_length {self.config.batch_length}"
            self.say("warning", f"nothing is learned before {what} is as long as {need}, and a step more")
        self.metrics.drain()
        scalars = self.metrics.means()
        scalars |= {"updates": self.updates, "replay_steps": len(self.replay)}
        scalars["env_restarts"] = self.envs.restarts + self.eval_envs.restarts
        scalars |= self.rates(fps=self.step, updates_per_second=self.updates)
        self.logger.scalars(scalars, self.step)
        self.logger.flush()

    def save(self):
        """Write a checkpoint that `restore` goes on from; the latents go to a file of their own beside it."""
        self.metrics.drain()
        latents = f"replay-{self.updates}.pt"
        atomic_save(self.logdir / latents, self.replay.save())
        checkpoint = {
            "agent": self.agent.save(),
            "counters": {"agent_steps": self.agent_steps, "updates": self.updates, "episodes": self.episodes},
            "clocks": {name: clock.state_dict() for name, clock in self.clocks.items()},
            "rng": get_rng_state(),
            "random": self.random.rng.bit_generator.state,
            "replay": latents,
            **{key: self.config[key] for key in SAME},
        }
        atomic_save(self.logdir / "latest.pt", checkpoint)
        for old in self.logdir.glob("replay-*.pt"):
            if old.name != latents:
                old.unlink(missing_ok=True)

    def restore(self, saved):
        """Go on from the logdir's checkpoint, as it was read, and its episodes, if it has any."""
        config = self.config
        if saved:
            check_same(saved, config)
            self.agent.load(saved["agent"])
        warn = functools.partial(self.say, "warning")
        latents = load_latents(self.logdir / saved["replay"], warn) if saved else None
        paths = [*self.offline_paths(), *self.own_paths()]
        self.replay.restore(latents, paths, warn)
        if (config.script == "train_offline" or config.offline_traindir) and not self.replay.ready():
            where = config.offline_traindir or f"--offline_traindir or {self.logdir / 'train_eps'}"
            raise UserError(f"{where} must hold {config.batch_length + 1} steps of this task to learn from")
        if saved is None and config.from_checkpoint:
            start = load_checkpoint(checkpoint_file(config.from_checkpoint))
            self.agent.load(start["agent"])
            self.agent_steps = start["counters"]["agent_steps"] if config.script == "eval_only" else 0
        elif saved is None and config.script == "eval_only":
            raise UserError("--script eval_only needs a --logdir with latest.pt, or --from_checkpoint")
        if saved is None:
            return
        for name, value in saved["counters"].items():
            setattr(self, name, value)
        for name, clock in self.clocks.items():
            clock.load_state_dict(saved["clocks"][name])
        self.random.rng.bit_generator.state = saved["random"]
        set_rng_state(saved["rng"])


if __name__ == "__main__":
    sys.exit(main())
