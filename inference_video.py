"""Watch trained agents play: one video per episode, their scores, and what their world model expected to see.

    python3 inference_video.py --checkpoint ~/logdir/run/latest.pt --episodes 5 --output ./videos/

The task and the model are those of the run's config.yaml, beside the checkpoint; any flag of dreamer.py overrides it.
"""

import contextlib
import json
import pathlib
import signal
import sys
import tempfile

from training import commands, installed

if __name__ == "__main__":
    installed.demand("inference_video.py")  # before the first package is imported
    commands.answer("inference_video.py", commands.of_film, __doc__)

import cv2
import imageio.v2 as imageio
import numpy as np

from agents import make_agent
from agents.random import Random
from envs import make_envs
from modalities import drawers, obs_spec
from specs import act_spec, step_layout
from tools import IMAGINED, SEEN, UserError, atomic_write, derive_seed, guard_output
from training import machine
from training.checkpoint import checkpoint_file, load_agent_state, load_checkpoint
from training.commands import FORMATS
from training.config import CONFIGS, load_config
from training.console import print_line, shown
from training.driver import Driver
from training.evaluation import heard, hearing, pictures_of, said
from training.foreign import check_foreign
from training.outputs import endless
from training.progress import Line, number
from training.rng import seed_everything, undisturbed
from training.sounds import add_sound, together
from training.videos import BORDER, as_rgb, beside, bordered, caption, check_mp4, with_below

PANEL = 192  # least height of an open-loop panel in pixels


def main(argv=None):
    """Run the command line; returns the exit status."""
    try:
        options, rest = commands.of_film(sys.argv[1:] if argv is None else argv, __doc__)
        with contextlib.ExitStack() as stack:
            players = open_players(options, rest, stack)
            summaries = film_players(players, options)
    except UserError as error:
        print_line(f"inference_video.py: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        return 130
    report(summaries)
    print_line(f"videos and scores.json: {options.output}", sys.stdout)
    return 0


# ---------------------------------------------------------------------------
# Agents and their environments


class Player:
    """An agent in an environment of its own.

    Args:
      name: a short unique name; path: its checkpoint, or None for the random agent.
      config: the whole configuration; options: of the command line.
    """

    def __init__(self, name, path, config, options):
        self.name, self.path, self.config, self.options = name, path, config, options
        self.mode = options.mode or config.eval_mode
        machine.prepare(config)
        saved = load_checkpoint(path) if path else None
        self.step = saved["counters"]["agent_steps"] * config.action_repeat if saved else None
        self.envs = make_envs(config.replace(parallel=False), "eval", 1)
        try:
            self.specs = obs_spec(self.envs.obs_space), act_spec(self.envs.act_space)
            self.agent = self.load(saved) if saved else Random(self.specs[1], derive_seed(config.seed, 3))
            if options.openloop and path and not self.predicts():
                raise UserError(
                    f"--openloop shows what a world model predicts, and the agent of {path} has none to show"
                )
            self.envs.reset()
            self.frame()  # an environment that cannot be filmed says so before anything is written
        except BaseException:
            self.envs.close()
            raise

    def load(self, saved):
        """Return the agent of a checkpoint."""
        agent = make_agent(self.config.replace(compile=False, graphs="false"), *self.specs)
        try:
            load_agent_state(agent, saved, self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        return agent

    def predicts(self):
        """True if the agent has a world model whose predictions can be drawn."""
        return not isinstance(self.agent, Random) and bool(drawers(self.specs[0], self.config))

    def frame(self):
        """Return the environment as people see it, uint8 (H, W, 3)."""
        size = self.options.size
        image = as_rgb(self.envs.render(0, size))
        if size and image.shape[:2] != tuple(size):
            shrinks = image.shape[0] > size[0]
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        return image


def open_players(options, rest, stack):
    """A Player for each checkpoint, all checked before the first one plays; `stack` closes them."""
    paths = [None if text == "none" else checkpoint_file(text) for text in options.checkpoint]
    known = [path for path in paths if path]
    players = []
    for index, path in enumerate(paths):
        run = path or (known[0] if known else None)  # a random agent plays what the others play
        if path and not path.is_file():
            raise UserError(f"{path}: no such checkpoint")
        config = load_config(rest, CONFIGS, run and run.parent / "config.yaml", warn)
        if run:
            check_foreign(config, run.parent, {word[2:].partition("=")[0] for word in rest if word.startswith("--")})
        if "task" not in config.explicit:
            raise UserError("a random agent without a checkpoint beside it needs --task")
        label = "random" if not path else path.resolve().parent.name if path.stem == "latest" else path.stem
        name = f"{index}_{label}" if len(paths) > 1 else label
        players.append(Player(name, path, config, options))
        stack.callback(players[-1].envs.close)
        if options.openloop and not path:
            print(f"inference_video.py: no open-loop video of {name}: a random agent predicts nothing", file=sys.stderr)
    return players


def warn(text):
    """Print a warning to stderr."""
    print_line(f"inference_video.py: warning: {text}")


# ---------------------------------------------------------------------------
# Playing on film


def film_players(players, options):
    """Play and film all episodes of all players; several get a subfolder each. Returns [summary]."""
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        summaries = []
        with contextlib.closing(Line()) as line:
            for player in players:
                folder = options.output / player.name if len(players) > 1 else options.output
                folder.mkdir(exist_ok=True)
                summaries.append(film_player(player, folder, options, line))
                write_json(folder / "scores.json", summaries[-1])
        if len(players) > 1:
            write_json(options.output / "scores.json", summaries)
        return summaries
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror or error}") from None


def film_player(player, folder, options, line):
    """All episodes of one player; returns its summary."""
    seed_everything(player.config.seed)
    scores, lengths, videos = [], [], []
    for index in range(options.episodes):
        # A video is renamed when it is whole, for its name tells the score; what is not whole goes with the scratch.
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch, contextlib.ExitStack() as stack:
            films = Films(pathlib.Path(scratch), options, stack)
            score, length = play(player, films, line, f"episode {index + 1}/{options.episodes}")
            stack.close()  # ends the files
            stem = f"episode_{index:03d}"
            videos += films.publish(folder, {"": f"{stem}_score_{score:.1f}", "openloop": f"{stem}_openloop"})
        scores.append(score)
        lengths.append(length)
    return {
        "agent": player.name,
        "checkpoint": str(player.path) if player.path else None,
        "step": player.step,
        "task": player.config.task,
        "seed": player.config.seed,
        "mode": player.mode if player.path else "random",
        "episodes": len(scores),
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "min": min(scores),
        "max": max(scores),
        "scores": scores,
        "lengths": lengths,
        "videos": videos,
    }


def play(player, films, line, name):
    """Play an episode on film; return the sum of its rewards and the number of agent steps."""
    finished = []
    layout = step_layout(player.envs.obs_space, player.specs[1])
    ears = hearing(player.agent)
    driver = Driver(player.envs, player.specs[1], layout, on_episode=[finished.append])
    frames = []

    def show(obs):
        frame, on = player.frame(), not obs["is_first"][0]
        if player.options.caption:
            step, score = (driver.lengths[0] + 1) * on, (driver.returns[0] + obs["reward"][0]) * on
            frame = caption(frame, step, score)
        frames.append((frame, obs[ears[0]][0] if ears else None))

    driver.on_obs = [show]
    open_loop = OpenLoop(player.agent, player.config.batch_length, films)
    if player.options.openloop and player.path:
        driver.on_obs.append(lambda obs: open_loop.begin(driver.carry))
        driver.on_step = [lambda index, step, stored: open_loop.add(step)]
    while not finished and driver.lengths[0] < player.envs.longest:
        driver.step(player.agent, player.mode, lambda: not finished)
        frame, sound = frames.pop()
        films.add("", beside(frame, pictures_of(player.agent, driver.carry)), sound)
        if finished or line.due():
            score = f"score={number(driver.returns[0])}"
            line.show([(0, name), (3, player.name), (2, f"step {driver.lengths[0]:,}"), (1, score)])
    driver.rest()
    open_loop.flush()
    if not finished:
        print_line(f"inference_video.py: warning: {endless(player.envs.longest)}; it is cut off there")
    return (finished[0].score, finished[0].length) if finished else (float(driver.returns[0]), int(driver.lengths[0]))


class Films:
    """The videos of an episode while they are made: {name: a file for each format}.

    Args:
      scratch: folder for files not yet whole; options: of the command line; stack: closes them.
    """

    def __init__(self, scratch, options, stack):
        self.scratch, self.options, self.stack = scratch, options, stack
        self.files, self.sounds = {}, {}

    def add(self, name, frame, sound=None):
        """Append a frame, uint8 (H, W, 3), to the video `name`: "" or "openloop/<key>"; and what is heard in it."""
        self.sounds.setdefault(name, []).append(sound)
        if name not in self.files:
            paths = [self.scratch / f"{len(self.files)}.{kind}" for kind in FORMATS[self.options.format]]
            self.files[name] = [(path, self.stack.enter_context(open_video(path, self.options.fps))) for path in paths]
        height, width, _ = frame.shape
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge")  # H.264 halves the colors' size
        for path, writer in self.files[name]:
            writer.append_data(even if path.suffix == ".mp4" else frame)

    def publish(self, folder, stems):
        """Rename the finished files; `stems` says how each kind of video shall be called. Returns their names."""
        names = []
        for name, files in self.files.items():
            kind, *key = name.split("/")
            for path, _ in files:
                if path.suffix == ".mp4":
                    check_mp4(path)
                    sound, samples = together(self.sounds[name], len(self.sounds[name]))
                    if sound is not None:
                        try:
                            add_sound(path, sound, samples * self.options.fps)
                        except OSError as error:  # the film stays, silent
                            warn(f"no sound: {error.strerror or error}")
                names.append("_".join([stems[kind], *key]) + path.suffix)
                path.replace(folder / names[-1])
        return names


def open_video(path, fps):
    """A writer of frames, one by one. GIFs come to disk when they are closed, for all frames share their palette."""
    if path.suffix == ".gif":
        return imageio.get_writer(path, mode="I", duration=1000 / fps, loop=0)
    return imageio.get_writer(path, fps=fps, macro_block_size=1, ffmpeg_log_level="error")


class OpenLoop:
    """Films truth | model | error of an episode, or curves of vectors, in chunks of `length` steps.

    In the first half of a chunk the model reconstructs what it sees (blue borders), in the second it knows the
    actions alone (orange borders). Each chunk begins with what the agent remembers there.
    """

    def __init__(self, agent, length, films):
        self.agent, self.length, self.films = agent, length, films
        self.steps, self.carry = [], None

    def begin(self, carry):
        """Note what the agent carries before it sees the step that `add` gets next."""
        if not self.steps:
            self.carry = carry

    def add(self, step):
        """Append one step {key: value}, with the action that led to it."""
        self.steps.append(step)
        if len(self.steps) == self.length:
            self.flush()

    def flush(self):
        """Film the steps so far, if they are enough for something seen and something imagined."""
        steps, self.steps = self.steps, []
        if len(steps) < 2:
            return
        arrays = {key: np.stack([step[key] for step in steps])[None] for key in steps[0]}  # (1, T, ...)
        seen = len(steps) // 2
        with undisturbed(self.agent.generators):  # what is shown changes nothing of what is done
            shown = self.agent.report(arrays, seen, self.carry)
        told = [(key, panels[0]) for key, panels in shown.items() if said(panels) or heard(panels)]
        for key, panels in shown.items():
            sounds = np.split(heard(panels)[1][0], len(steps)) if heard(panels) else [None] * len(steps)
            under = told if len(panels) > 1 else ()
            for time, images in enumerate(zip(*(sequences[0] for sequences in panels), strict=True)):
                color = SEEN if time < seen else IMAGINED
                frame = np.concatenate([panel(image, color) for image in images], 1)
                below = [(name, drawing[:1, time]) for name, drawing in under]
                self.films.add(f"openloop/{key}", with_below(frame, below, color), sounds[time])


def panel(image, color):
    """An image (H, W, C), enlarged by a whole number, with a border."""
    factor = max(1, PANEL // image.shape[0])
    return bordered(as_rgb(image).repeat(factor, 0).repeat(factor, 1), color, BORDER)


# ---------------------------------------------------------------------------
# What is told at the end


def write_json(path, content):
    atomic_write(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def report(summaries):
    """Print a table, a line for each agent."""
    names = [shown(summary["agent"]) for summary in summaries]
    wide = max(map(len, names))
    lines = [f"{'agent':{wide}}  {'step':>11}  episodes  {'mean':>8}  {'std':>8}  {'min':>8}  {'max':>8}  length"]
    for name, summary in zip(names, summaries, strict=True):
        step = "-" if summary["step"] is None else f"{summary['step']:,}"
        numbers = "  ".join(f"{summary[key]:8.1f}" for key in ("mean", "std", "min", "max"))
        lengths = summary["lengths"]
        span = f"{np.mean(lengths):.1f} ({min(lengths)} to {max(lengths)})"
        lines.append(f"{name:{wide}}  {step:>11}  {summary['episodes']:8}  {numbers}  {span}")
    for line in lines:
        print_line(line, sys.stdout)


if __name__ == "__main__":
    guard_output()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with nothing half-written
    sys.exit(main())
