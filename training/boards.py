"""Where metrics and videos are looked at: TensorBoard and Weights & Biases, with metrics in the same groups."""

import contextlib
import html
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
import wave
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from tools import UserError, atomic_write

# The group of a metric is the first whose expression its whole name matches. Boards sort groups and names by the
# alphabet: the evaluation's group comes first and holds its return alone (what environments count in it has a group of
# its own), and what is about actor and critic is called policy, for behavior would come before it.
GROUPS = {
    "eval": r"eval_return",
    "eval_log": r"eval_log_.*",
    "train": r"train_return|log_.*",
    "policy": r"(expl_)?(actor_|adv|imag_|return_|policy_(?!age)|value_|repval_|critic_|worker_|manager_|goal_).*"
    r"|(disag|expl_model)_.*",
    "time": r".*(_|^)(episodes|length|steps|restarts|seconds|second|fps|updates)"
    r"|control_ticks|deadlines?_.*|weights_(version|age)|policy_age|safe_actions|train_ratio",
    "world": r".*",
}
MAIN = "eval/eval_return"
MARK = b"custom_scalars"  # in the event files that have groups; a run without such a file began before there were any
LAYOUT = {  # of the tab Custom Scalars: [kind of chart, regular expressions of the curves]
    "returns": {
        "return of evaluations": ["Multiline", [rf"^{MAIN}$"]],
        "return of training episodes": ["Multiline", [r"^train/train_return$"]],
        "return that it imagines": ["Multiline", [r"^policy/imag_return$"]],
    },
    "what is learned": {
        "losses of its predictions": ["Multiline", [r"^world/(?!policy|dyn|rep|model).+_loss$"]],
        "KL: above 1, the free nats, there is something to learn": ["Multiline", [r"^world/kl$"]],
        "entropy of the actor": ["Multiline", [r"^policy/actor_entropy$"]],
    },
    "speed": {
        "frames per second": ["Multiline", [r"^time/fps$"]],
        "updates per second": ["Multiline", [r"^time/updates_per_second$"]],
    },
}


def tag(name):
    """Return the name of a metric in its group, group/name; a name with a slash has one already."""
    if "/" in name:
        return name
    return f"{next(group for group, names in GROUPS.items() if re.fullmatch(names, name))}/{name}"


def except_of_tensorboard(args):
    """Print what ended a thread, unless it is one that tells the next who writes, as of a full disk."""
    if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)


class TensorBoard:
    """TensorBoard's event files; videos are GIFs among its images.

    The tabs HParams and Text show what `config` and the command line say, Custom Scalars the charts of `LAYOUT`.
    """

    def __init__(self, logdir, step=0, config=None, chosen=()):
        """
        Args:
          step: where a resumed run goes on. What was logged later is hidden, for the run does it again.
          chosen: dotted keys of `config` that the user set. HParams shows them first.
        """
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = except_of_tensorboard
        older = step and not any(MARK in beginning(path) for path in logdir.glob("events.out.tfevents.*"))
        self._events = SummaryWriter(str(logdir), purge_step=step + 1 if step else None)
        self.flush, self.close = self._events.flush, self._events.close
        self._events.add_custom_scalars(LAYOUT)
        if config:
            settings = dict(flat(config))
            self._events.add_text("config", listing(f"{name}: {value}" for name, value in settings.items()), step)
            self._events.add_text("command", listing([shlex.join([sys.executable, *sys.argv])]), step)
            for name, content in hparams(settings, chosen, logdir.resolve().name).items():
                about = metadata.create_summary_metadata(content)
                self._write(Summary.Value(tag=name, metadata=about, tensor=metadata.NULL_TENSOR))

        for row in history(logdir / "metrics.jsonl", step) if older else ():
            self.scalars({name: float(value) for name, value in row.items() if name != "step"}, row["step"])

    def scalars(self, numbers, step):
        """Write {name: number}, each in its group."""
        for name, number in numbers.items():
            self._events.add_scalar(tag(name), number, step)

    def video(self, name, gif, shape, step):
        """Write a GIF as an image: SummaryWriter.add_video silently does nothing without an obsolete moviepy."""
        height, width, channels = shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=gif)
        self._write(Summary.Value(tag=name, image=image), step)

    def text(self, name, text, step):
        """Write a text in Markdown."""
        self._events.add_text(name, text, step)

    def audio(self, name, path, step):
        """Write the sound of a WAV file."""
        with wave.open(str(path)) as file:
            rate, channels, length = file.getframerate(), file.getnchannels(), file.getnframes()
        sound = Summary.Audio(sample_rate=rate, num_channels=channels, length_frames=length, content_type="audio/wav")
        sound.encoded_audio_string = path.read_bytes()
        self._write(Summary.Value(tag=name, audio=sound), step)

    def _write(self, value, step=None):
        self._events._get_file_writer().add_summary(Summary(value=[value]), step)


def beginning(path):
    """Return the first bytes of an event file, in which the layout stands."""
    with open(path, "rb") as file:
        return file.read(10_000)


def history(path, step):
    """Return the rows of metrics.jsonl up to a step, without those that a resumed run did again."""
    kept: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a kill can truncate a line
            row = json.loads(line)
            if kept and row["step"] < kept[-1]["step"]:  # resumed
                kept = [earlier for earlier in kept if earlier["step"] < row["step"]]
            kept.append(row)
    return [row for row in kept if row["step"] <= step]


def flat(tree, prefix=""):
    """Yield (dotted name, value) of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def listing(lines):
    """Return lines as text that Markdown leaves as it is."""
    return "\n".join(f"    {line}" for line in lines)


def hparams(settings, chosen, name):
    """Return {tag: content} of TensorBoard's HParams: columns of {dotted name: value} and of the evaluations' return.

    chosen: keys of the columns that come first, with those of task and seed; name: of the run, whose row it is.
    """
    columns, row = [], plugin_data_pb2.SessionStartInfo(group_name=name)
    first = {"task", "seed", *chosen} - {
        "logdir"
    }  # TensorBoard shows five: those that are said to differ, if there are
    for key, value in settings.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        kind = api_pb2.DATA_TYPE_FLOAT64 if number else api_pb2.DATA_TYPE_STRING
        columns.append(api_pb2.HParamInfo(name=key, type=kind, differs=key in first))
        if number:
            row.hparams[key].number_value = value
        else:
            row.hparams[key].string_value = str(value)
    metric = api_pb2.MetricInfo(name=api_pb2.MetricName(tag=MAIN), display_name="eval_return")
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=[metric])
    return {
        metadata.EXPERIMENT_TAG: plugin_data_pb2.HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: plugin_data_pb2.HParamsPluginData(session_start_info=row),
    }


def run_id(path):
    """Return the id of wandb's run that a file holds, None if there is no file. Raises UserError if it is no id."""
    if not path.exists():
        return None
    text = path.read_bytes().strip()
    if not re.fullmatch(rb"[\w-]{1,128}", text):
        raise UserError(f"{path} holds no id of a run of Weights & Biases: remove it to begin a new one")
    return text.decode("ascii")


class WeightsAndBiases:
    """Weights & Biases, configured by its own environment variables (WANDB_MODE=offline, WANDB_PROJECT, ...).

    The id of its run is stored in the logdir, so that a resumed run continues the same one.
    """

    def __init__(self, logdir, step=0, config=None, chosen=()):
        """Raises UserError, with nothing left behind, if wandb is not installed or refuses the run."""
        try:
            import wandb
        except ImportError:
            raise UserError("--logger wandb needs a package: pip install -r requirements/wandb.txt") from None
        self._video, self._audio, self._html = wandb.Video, wandb.Audio, wandb.Html
        known = logdir / "wandb_id.txt"
        try:
            with made(logdir):
                self._run: Any = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "dreamer"),
                    name=os.environ.get("WANDB_NAME", logdir.name),
                    dir=str(logdir),
                    id=run_id(known),
                    resume="allow",
                    config=config,
                    settings=wandb.Settings(console="off"),  # otherwise the progress line fills its log
                )
        except wandb.Error as error:
            raise UserError(f"--logger wandb: {str(error).splitlines()[0]}") from None
        atomic_write(known, lambda file: file.write(self._run.id.encode()))
        # The x axis is our step: wandb's own counter drops late values, as after a resume.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, numbers, step):
        """Log {name: number}, each in its group."""
        self._run.log({"step": step, **{tag(name): number for name, number in numbers.items()}})

    def video(self, name, gif, shape, step):
        """Log a GIF."""
        self._run.log({"step": step, name: self._video(io.BytesIO(gif), format="gif")})

    def text(self, name, text, step):
        """Log a text in Markdown, as it is written."""
        self._run.log({"step": step, name: self._html(f"<pre>{html.escape(text)}</pre>")})

    def audio(self, name, path, step):
        """Log the sound of a WAV file."""
        self._run.log({"step": step, name: self._audio(str(path))})

    def flush(self):
        """Do nothing: wandb's own process writes immediately."""

    def close(self):
        """End the run."""
        self._run.finish()


@contextlib.contextmanager
def made(folder):
    """Make a folder and what is missing above it; remove them again if the body raises."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if missing:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run may have begun beside it
            for path in missing[1:]:
                path.rmdir()
        raise
