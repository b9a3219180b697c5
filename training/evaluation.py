"""Episodes that are played to be watched: evaluations, open-loop predictions, films."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from replay.episodes import EpisodeWriter
from specs import ActionSpec, ObsSpec, step_layout
from tools import UserError
from training.distributed import Ranks
from training.driver import Driver, Episode
from training.outputs import Outputs, endless
from training.protocol import Agent
from training.sounds import add_sound, together, wav
from training.videos import as_rgb, beside, board_film, captioned, open_loop, visible, write_mp4

OPEN_LOOPS = 6  # sequences whose predictions are shown
LONGEST = 500  # frames of an evaluation's first episode that are kept for its video
FILM = 2000  # steps of an episode that are filmed
FPS = 30  # of them, in a second
ALONE = Ranks()


class Evaluation:
    """Plays a number of episodes in environments of their own.

    Args:
      envs: Envs; act_spec: ActionSpec; layout: {key: (shape, dtype)} of a stored step.
      episodes: how many; each environment plays its share. mode: of acting.
      watched: image keys whose frames are kept, for the video of the first environment's first episode.
      on_step, on_episode: as the Driver's, for the steps and episodes that count.
    Attributes:
      frames: {key: [(H, W, C)]} of `watched`; scores: [the sum of rewards up to there]; pictures: [what the agent then
        was after].
      cut: how many episodes were broken off because they took longer than `envs.longest`; they count as they are.
    """

    def __init__(
        self,
        envs: Any,
        act_spec: Any,
        layout: Mapping[str, Any],
        episodes: int,
        mode: str,
        watched: Iterable[str] = (),
        on_step: Sequence[Callable] = (),
        on_episode: Sequence[Callable] = (),
    ):
        self.envs, self.mode = envs, mode
        self.quota = np.array([len(part) for part in np.array_split(np.arange(episodes), len(envs))])
        self.done = np.zeros(len(envs), int)
        self.played: list[Episode] = []
        self.cut = 0
        self.frames: dict[str, list[np.ndarray]] = {key: [] for key in watched}
        self.scores: list[float] = []
        self.pictures: list[list[np.ndarray]] = []
        self.on_step, self.on_episode = on_step, on_episode
        self.driver = Driver(envs, act_spec, layout, [self._watch], [self._step], [self._finish])

    def play(self, agent: Agent, going: Callable[[], bool] = lambda: True) -> list[Episode]:
        """Play the episodes, as long as `going()`; return those that were finished."""

        def wanted() -> bool:
            return bool((self.done < self.quota).any())

        while wanted() and going():
            self.driver.step(agent, self.mode, wanted)
            if len(self.scores) > len(self.pictures):
                self.pictures.append(pictures_of(agent, self.driver.carry))
        self.driver.rest()
        return self.played

    def _watch(self, obs):
        if not self.frames or self.done[0] or len(self.scores) == LONGEST:
            return
        self.scores.append(float(obs["reward"][0]) + (self.scores[-1] if self.scores else 0.0))
        for key, frames in self.frames.items():
            frames.append(obs[key][0].copy())  # not a view, which would keep the images of all environments

    def _step(self, index, step, stored):
        if self.done[index] == self.quota[index]:
            return
        for function in self.on_step:
            function(index, step, stored)
        length = int(self.driver.lengths[index])
        if length >= self.envs.longest and not step["is_last"]:  # and neither would the next ones end
            self._finish(Episode(index, float(self.driver.returns[index]), length, {}))
            self.done[index] = self.quota[index]
            self.cut += 1

    def _finish(self, episode):
        if self.done[episode.env] < self.quota[episode.env]:
            self.done[episode.env] += 1
            self.played.append(episode)
            for function in self.on_episode:
                function(episode)


def evaluate(
    agent: Agent,
    envs: Any,
    config: Any,
    out: Outputs,
    specs: tuple[ObsSpec, ActionSpec],
    step: int,
    going: Callable[[], bool] = lambda: True,
    replay: Any = None,
    ranks: Ranks = ALONE,
) -> float | None:
    """Play `eval_episode_num` episodes and log their returns and videos; return their mean, None if it ended early.

    Args:
      envs: evaluation environments; config: as this rank acts on it; step: environment frames that training has seen.
      going: the evaluation ends early when this is false.
      replay: from which open-loop predictions are shown; None shows them from the episodes just played.
      ranks: that play as many each.
    """
    obs_spec, act_spec = specs
    layout = step_layout(envs.obs_space, act_spec)
    writer = EpisodeWriter(out.logdir / "eval_eps", len(envs), config.dataset_size)
    beginnings = Beginnings(config.batch_length)
    evaluation = Evaluation(
        envs,
        act_spec,
        layout,
        config.eval_episode_num,
        config.eval_mode,
        watched=obs_spec.of("image") if config.video_pred_log else (),
        on_step=[lambda index, obs, stored: writer.add(index, obs), beginnings],
        on_episode=[lambda episode: out.score(step, "eval", episode)],
    )
    parts = ranks.gather(evaluation.play(agent, going))
    for episode in (episode for rank, part in enumerate(parts) if rank != ranks.rank for episode in part):
        out.score(step, "eval", episode)
    episodes = [episode for part in parts for episode in part]
    out.say_restarts(envs)
    if evaluation.cut:
        out.say("warning", f"{endless(envs.longest)}; the evaluation has counted {evaluation.cut} as they were then")
    if not episodes:
        return None
    scores, lengths = ([getattr(episode, name) for episode in episodes] for name in ("score", "length"))
    result = {"eval_return": np.mean(scores), "eval_length": np.mean(lengths), "eval_episodes": len(scores)}
    names = sorted({name for episode in episodes for name in episode.logs})
    result |= {f"eval_{name}": np.mean([episode.logs.get(name, 0.0) for episode in episodes]) for name in names}
    out.logger.scalars(result, step)
    if config.video_pred_log:
        if replay is None:
            arrays = beginnings.arrays()
        else:
            arrays = replay.sample(min(OPEN_LOOPS, config.batch_size), fresh=False)[0] if replay.ready() else None
        show(evaluation, agent, config, out, step, arrays)
    out.logger.flush()
    spread = f"std {np.std(scores):.1f}, min {min(scores):.1f}, max {max(scores):.1f}"
    out.say("info", f"step {step:,}: eval_return {np.mean(scores):.1f} over {len(scores)} episodes ({spread})")
    return float(np.mean(scores)) if len(scores) == config.eval_episode_num * ranks.count else None


def show(
    evaluation: Evaluation, agent: Agent, config: Any, out: Outputs, step: int, arrays: Mapping[str, Any] | None
) -> None:
    """Log what an evaluation watched, and open-loop predictions of sequences {key: (B, T, ...)}, if there are any."""
    start = time.monotonic()
    for key, frames in evaluation.frames.items():
        shown = zip(visible(np.stack(frames), config.frame_stack), evaluation.pictures, strict=True)
        video = [beside(frame, pictures) for frame, pictures in shown]
        out.logger.video(f"eval_policy/{key}", board_film(video, evaluation.scores), step, fps=20)
    if show_open_loop(agent, config, out, step, arrays) or evaluation.frames:
        out.logger.scalars({"video_seconds": time.monotonic() - start}, step)


def pictures_of(agent: Agent, carry: Any) -> list[np.ndarray]:
    """Return what an agent is after in the first environment, drawn: [uint8 (H, W, 3)], [] of one that cannot tell."""
    return agent.pictures(carry) if hasattr(agent, "pictures") else []


class Beginnings:
    """Keeps the first `length` steps of the first episodes, as sequences whose prediction can be shown."""

    def __init__(self, length: int):
        self.length = length
        self.episodes: list[list[dict[str, Any]]] = []
        self.under_way: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, index: int, step: dict[str, Any], stored: Any) -> None:
        """Take a step of environment `index`."""
        if step["is_first"] and len(self.episodes) < OPEN_LOOPS:
            self.under_way[index] = []
            self.episodes.append(self.under_way[index])
        elif step["is_first"]:
            self.under_way.pop(index, None)
        if len(self.under_way.get(index, [None] * self.length)) < self.length:
            self.under_way[index].append(step)

    def arrays(self) -> dict[str, np.ndarray] | None:
        """Return {key: (B, length, ...)} of the episodes that were long enough, or None if none was."""
        long = [episode for episode in self.episodes if len(episode) == self.length]
        return {key: np.stack([[s[key] for s in episode] for episode in long]) for key in long[0][0]} if long else None


def show_open_loop(agent: Agent, config: Any, out: Outputs, step: int, arrays: Mapping[str, Any] | None) -> bool:
    """Log open-loop predictions, truth | model | error, also as GIFs under openloop/<key>/; True if there are any.

    What is said and heard stands under pictures; it is logged as text and sound, too, and beside the GIF as such files.
    """
    seen = config.batch_length // 2
    shown = agent.report(arrays, seen) if arrays else {}
    told = [(key, panels[0]) for key, panels in shown.items() if said(panels) or heard(panels)]
    for key, panels in shown.items():
        path = out.logdir / "openloop" / key / f"{step:09d}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = list(open_loop(panels, seen, config.frame_stack, told if len(panels) > 1 else ()))
        if lines := said(panels):
            table = read_aloud(lines, seen)
            path.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
            out.logger.text(f"openloop/{key}", table, step)
        if sound := heard(panels):
            rate, waves = sound
            path.with_suffix(".wav").write_bytes(wav(waves[0], rate))
            out.logger.audio(f"openloop/{key}", path.with_suffix(".wav"), step)
        frames += frames[-1:] * 10  # on which a film that starts over rests a second
        path.write_bytes(out.logger.video(f"openloop/{key}", np.stack(frames), step, fps=10))
    return bool(shown)


def said(panels: Any) -> Any:
    """Return what can be read of a prediction, [[(truth, model) of each step] of each sequence], or None."""
    return getattr(panels, "lines", None)


def heard(panels: Any) -> Any:
    """Return what can be heard of a prediction, (rate, (B, n, 2)): the truth left and the model right; or None."""
    return getattr(panels, "sound", None)


def read_aloud(lines: Sequence[Sequence[tuple[str, str]]], seen: int) -> str:
    """Return what was said and predicted as a table in Markdown, a row where either changes."""
    rows = ["| sequence | step | the model | truth | prediction |", "|---|---|---|---|---|"]
    for index, sequence in enumerate(lines):
        before: Any = None
        for time_, pair in enumerate(sequence):
            if (pair, time_ < seen) != before:
                words = (f"`{legible(text)}`" for text in pair)
                rows.append(f"| {index} | {time_} | {'sees' if time_ < seen else 'imagines'} | {' | '.join(words)} |")
            before = pair, time_ < seen
    return "\n".join(rows)


def legible(text: str) -> str:
    """Return a text for a cell of a table: one line, without what ends a cell, and escaped what cannot be printed."""
    plain = " ".join(re.sub("[|`]", " ", text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in plain)


def record_film(agent: Agent, envs: Any, act_spec: Any, mode: str, out: Outputs, step: int) -> None:
    """Play an episode on film, logdir/videos/<step>_score_<score>.mp4, and log it, if the environment can be filmed."""
    start = time.monotonic()
    try:
        sounds: list[Any] = []
        frames, scores = film(envs, act_spec, agent, mode, sounds=sounds)
    except UserError as error:
        out.say("info", f"no video: {error}")
        return
    path = out.logdir / "videos" / f"{step:09d}_score_{scores[-1]:.1f}.mp4"
    try:
        write_mp4(path, captioned(frames, scores), fps=FPS)
    except OSError as error:  # a run that was saved does not end in error for its film
        path.unlink(missing_ok=True)
        out.say("warning", f"no video in {path.parent}: {error.strerror or error}")
        return
    sound, samples = together(sounds, len(frames))
    if sound is not None:
        try:
            add_sound(path, sound, samples * FPS)
        except OSError as error:  # the film stays, silent
            out.say("warning", f"no sound: {error.strerror or error}")
    out.logger.video("film/episode", board_film(frames, scores), step, fps=20)
    out.logger.scalars({"film_seconds": time.monotonic() - start}, step)
    out.logger.flush()
    out.say("info", f"video: {path}")


def hearing(agent: Agent) -> list[str]:
    """Return the keys of the sounds that an agent hears."""
    obs_spec = getattr(agent, "obs_spec", None)
    return list(obs_spec.of("audio")) if isinstance(obs_spec, ObsSpec) else []


def film(
    envs: Any, act_spec: Any, agent: Agent, mode: str, longest: int = FILM, sounds: list[Any] | None = None
) -> tuple[list[np.ndarray], list[float]]:
    """Return pictures of an episode of the first of `envs`, or of its first `longest` steps, and the scores so far.

    What the agent is after stands beside them. The last score is that of the end, which has no picture. `sounds` gets
    what the agent hears in each step, if it can. Raises UserError if the environment cannot be filmed, or only in
    pictures of several sizes.
    """
    frames: list[np.ndarray] = []
    scores: list[float] = []
    over: list[bool] = []
    ears = hearing(agent)

    def watch(obs):
        over.append(bool(obs["is_last"][0]))
        score = float(obs["reward"][0]) + (scores[-1] if scores else 0.0)
        if not over[-1]:
            if ears and sounds is not None:
                sounds.append(obs[ears[0]][0])
            frames.append(as_rgb(envs.render(0)))
            scores.append(score)
        elif scores:
            scores[-1] = score

    driver = Driver(envs, act_spec, {"reward": (), "is_first": (), "is_last": ()}, on_obs=[watch])
    try:
        while not (over and over[-1]) and len(frames) < longest:
            count = len(frames)
            driver.step(agent, mode, lambda: not over[-1])
            if len(frames) > count:
                frames[-1] = beside(frames[-1], pictures_of(agent, driver.carry))
    except Exception:
        with contextlib.suppress(RuntimeError, UserError):
            driver.rest()
        raise
    driver.rest()
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) > 1:
        raise UserError(f"its pictures have several sizes, {shapes[0]} and {shapes[1]} among them")
    return frames, scores
