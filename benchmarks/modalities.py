"""Tell whether texts and sounds help: worlds that cannot be solved without them, and suites that have them.

python3 benchmarks/modalities.py --out logdir/modalities --write docs/modalities.md

Runs dreamer.py for every case and seed, with what tells and without it, one after the other: finished runs are left
alone, others begin or go on. Prints a table, and puts it between its markers in a page; beside the page it draws the
spectrum of a tone and of its prediction, modalities.png. `--cases tone` runs one alone.
"""

import contextlib
import pathlib
import sys
import wave
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/modalities.py")  # before the first package is imported

import numpy as np

from agents.random import Random
from benchmarks.family import MISSING, eval_curve, is_done, lines, run_all
from benchmarks.pages import machine, markdown, mean_and_error, publish
from envs import make_envs
from envs.dummy_told import All, Instruction, New, Tone
from specs import act_spec, step_layout
from tools import Parser, derive_seed
from training.config import CONFIGS, load_config
from training.evaluation import Evaluation

# At the size of quickstart, so that a run takes minutes on two cores.
SHARED = """--configs quickstart --horizon 20 --eval_every 2000 --eval_episode_num 100 --eval_envs 10 --log_every 500
--opt.lr 1e-3 --actor.entropy 1e-2 --compile true"""
WORDS = "--text.length 24 --text.layers 1 --text.units 32"
TEXT, SOUND = "--encoder.text_keys $^", "--encoder.audio_keys $^"
EPISODES = 100  # of the random agent
ROWS = 14  # of the table of texts


class Case(NamedTuple):
    """A task with what tells what to do in it.

    flags: of its runs; blind: flags that leave out what tells, "" for no such runs; best: the best return, None where
    it is not known; loss: whose fall is told; seeds: how many runs there are, if not as many as are asked for.
    """

    flags: str
    blind: str
    best: float | None
    loss: str
    seeds: int | None = None


CASES = {
    "instruction": Case(
        f"{SHARED} {WORDS} --task dummy_instruction --steps 8000", TEXT, Instruction.best(), "instruction_loss"
    ),
    "tone": Case(f"{SHARED} --task dummy_tone --steps 8000", SOUND, Tone.best(), "tone_loss"),
    "instruction_new": Case(
        f"{SHARED} {WORDS} --task dummy_instruction_new --steps 20000", "", New.best(), "instruction_loss"
    ),
    "all": Case(
        f"""--configs multimodal quickstart {SHARED.removeprefix("--configs quickstart ")} {WORDS} --task dummy_all
        --size 16 16 --encoder.mults 2 4 --decoder.mults 2 4 --encoder.depth 4 --decoder.depth 4 --steps 16000""",
        f"{TEXT} {SOUND}",
        All.best(),
        "instruction_loss",
        1,
    ),
    "babyai": Case(
        """--configs minigrid quickstart --task minigrid_BabyAI-GoToLocal-v0 --steps 20000 --train_ratio 16
        --horizon 333 --video_pred_log false --eval_every 0 --eval_episode_num 200 --eval_envs 10 --log_every 1000
        --text.length 32 --encoder.depth 8 --decoder.depth 8 --opt.lr 1e-3""",
        TEXT,
        None,
        "mission_loss",
        1,
    ),
    "atari": Case(
        """--configs atari100k quickstart --task atari100k_pong --atari.sound true --audio.rate 30720 --steps 8000
        --horizon 333 --train_ratio 64 --eval_every 0 --eval_episode_num 1 --eval_envs 1 --log_every 500
        --encoder.depth 8 --decoder.depth 8""",
        "",
        None,
        "sound_loss",
        1,
    ),
}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("logdir/modalities"), help="where the runs go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="some of them (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--finished", action="store_true", help="run nothing; tell what is finished")
    return publish(parser, argv, told, "modalities", processes=1)


def told(args):
    """Return the table, examples of texts, and a picture of a sound if there is a page beside which it can be."""
    text, sound, words = compare(args), newest(args, "tone", "wav"), newest(args, "instruction", "md")
    if words:
        rows = words.read_text(encoding="utf-8").splitlines()[:ROWS]
        text += "\n\nWhat was said, and what the model of a run says:\n\n" + "\n".join(rows)
    if sound and args.write:
        picture = pathlib.Path(args.write).with_suffix(".png")
        draw(sound, picture)
        text += f"\n\n![Spectra of tones, and of what the model of a run predicts]({picture.name})"
    return text


def compare(args):
    """Make the runs; return the table."""
    runs = {}  # {logdir: flags}, those with what tells first
    for blind in (False, True):
        for name in args.cases:
            runs |= {logdir: flags(CASES[name], blind, seed) for seed, logdir in enumerate(logdirs(args, name, blind))}
    run_all(runs, args)
    rows = [row for name in args.cases for row in described(args, name)]
    head = ("task", "seen", "return of each seed", "mean ± s.e.", "share of the best", "loss of what tells")
    return f"{markdown(head, rows)}\n\n{machine()}."


def logdirs(args, name, blind):
    """Return the logdirs of a case, one for each seed; of blind runs, which have nothing to learn, one if any."""
    count = bool(CASES[name].blind) if blind else CASES[name].seeds or args.seeds
    return [args.out / f"{name}{'_blind' if blind else ''}_{seed}" for seed in range(count)]


def flags(case, blind=False, seed=0):
    """Return the words of a run's command line."""
    return [*case.flags.split(), *(case.blind.split() if blind else ()), "--seed", str(seed)]


def described(args, name):
    """Return the rows of a case: with what tells, blind, and a random agent."""
    case, rows = CASES[name], []
    task = case.flags.split()[case.flags.split().index("--task") + 1]
    for blind in (False, True) if case.blind else (False,):
        done = [logdir for logdir in logdirs(args, name, blind) if is_done(logdir)]
        finals = [final(logdir) for logdir in done]
        means = [mean for mean, _ in finals]
        error = mean_and_error(means)[1] if len(means) > 1 else finals[0][1] if finals else 0.0
        mean = sum(means) / len(means) if means else 0.0
        rows.append(
            [
                f"`{task}`" if not blind else "",
                "blind" if blind else "all",
                ", ".join(f"{value:.2f}" for value in means) or MISSING,
                f"{mean:.2f} ± {error:.2f}" if means else MISSING,
                f"{mean / case.best:.2f}" if means and case.best else MISSING,
                fall(done[0], case.loss) if done and not blind else MISSING,
            ]
        )
    mean, error = random_return(case)
    share = f"{mean / case.best:.2f}" if case.best else MISSING
    rows.append(["", "random agent", MISSING, f"{mean:.2f} ± {error:.2f}", share, MISSING])
    return rows


def final(logdir):
    """Return the mean return of the last evaluation, and its standard error over the episodes."""
    last = eval_curve(logdir)[0][-1]
    rows = [row for row in lines(logdir / "scores.jsonl") if row["mode"] == "eval" and row["step"] == last]
    scores = [row["score"] for row in rows]
    return mean_and_error(scores) if len(scores) > 1 else (scores[0], 0.0)


def fall(logdir, name):
    """Say from what to what a loss fell, and in how many updates."""
    rows = [row for row in lines(logdir / "metrics.jsonl") if name in row]
    updates = max(row.get("updates", 0) for row in rows)
    return f"{rows[0][name]:.1f} → {rows[-1][name]:.1f} in {updates:,.0f} updates"


def newest(args, name, suffix):
    """Return the last prediction of what tells in a case's first run, a file of open-loop predictions, or None."""
    folder = logdirs(args, name, False)[0] / "openloop" / CASES[name].loss.removesuffix("_loss")
    return max(folder.glob(f"*.{suffix}"), default=None)


def draw(path, out):
    """Draw the spectra of a WAV's two channels, the truth and the model, over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with wave.open(str(path)) as file:
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    sound = np.frombuffer(data, "<i2").reshape(-1, 2) / 32768
    figure, parts = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    for axes, channel, name in zip(parts, sound.T, ("truth", "model: sees, then imagines"), strict=True):
        frames = np.lib.stride_tricks.sliding_window_view(channel, 256)[::128] * np.hanning(256)
        decibels = 20 * np.log10(np.abs(np.fft.rfft(frames)) + 1e-3)
        place = 0, len(sound) / rate, 0, rate / 2
        axes.imshow(decibels.T, origin="lower", aspect="auto", extent=place, vmin=-40, vmax=40)
        axes.set(title=name, ylabel="Hz")
        axes.axvline(len(sound) / rate / 2, color="white", linestyle=":")
    parts[-1].set_xlabel("seconds")
    figure.savefig(out, dpi=110)


def random_return(case):
    """Return the mean return of a random agent, and its standard error."""
    config = load_config(flags(case), CONFIGS)
    with contextlib.closing(make_envs(config, "eval", 1)) as envs:
        spec = act_spec(envs.act_space)
        count = 1 if "atari" in config.task else EPISODES
        evaluation = Evaluation(envs, spec, step_layout(envs.obs_space, spec), count, "sample")
        scores = [episode.score for episode in evaluation.play(Random(spec, derive_seed(config.seed, 3)))]
    return mean_and_error(scores) if len(scores) > 1 else (scores[0], 0.0)


if __name__ == "__main__":
    sys.exit(main())
