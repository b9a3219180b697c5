import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from tools import UserError
from training.boards import MAIN, WeightsAndBiases, tag
from training.logger import Logger, Metrics, NonFiniteLoss
from training.sounds import wav

HPARAMS = "experiment", "session_start_info"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def resumed(logdir, step):
    """Return a Logger that goes on at `step`, in a later second than the last.

    TensorBoard reads event files by their names, which begin with the second and end with a count that is not padded.
    """
    if step:
        time.sleep(1 - time.time() % 1)
    return Logger(logdir, step=step)


def events(logdir):
    return EventAccumulator(str(logdir), size_guidance={"images": 0, "scalars": 0}).Reload()


# Metrics


def test_scalars_of_one_step_are_one_line(tmp_path):
    logger = Logger(tmp_path)
    logger.scalars({"model_loss": torch.tensor(1.5, dtype=torch.bfloat16), "opt/grad norm": np.float32(0.25)}, 10)
    logger.scalars({"updates": 7, "kl": torch.tensor([2.0]), "n": np.int64(3)}, 10)
    assert lines(tmp_path / "metrics.jsonl") == []
    logger.flush()
    expected = {"step": 10, "model_loss": 1.5, "opt/grad norm": 0.25, "updates": 7, "kl": 2.0, "n": 3}
    assert lines(tmp_path / "metrics.jsonl") == [expected]
    logger.flush()
    logger.scalars({"kl": 1.0}, 20)
    logger.scalars({"kl": 0.5}, 30)
    logger.close()
    assert lines(tmp_path / "metrics.jsonl")[1:] == [{"step": 20, "kl": 1.0}, {"step": 30, "kl": 0.5}]


def test_a_metric_is_what_it_was_when_logged(tmp_path):
    logger = Logger(tmp_path)
    loss = torch.tensor(1.0)
    logger.scalars({"loss": loss}, 1)
    loss.add_(1)  # as the replay of a captured graph does
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


def test_non_finite_metrics_stay_json(tmp_path):
    logger = Logger(tmp_path)
    logger.scalars({"a": float("nan"), "b": torch.tensor(float("inf")), "c": np.float32("-inf")}, 1)
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    assert np.isnan(events(tmp_path).Scalars("world/a")[0].value)


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), np.zeros((2, 1))])
def test_a_metric_must_be_one_number(tmp_path, value):
    logger = Logger(tmp_path)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        logger.scalars({"good": 1.0, "loss": value}, 1)
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == []


def test_tensorboard_has_the_same_names_in_groups_and_the_same_steps_and_values(tmp_path):
    logger = Logger(tmp_path)
    for step in (1000, 2000):
        logger.scalars({"train_return": step / 8, "opt/grad norm": 1}, step)
        logger.flush()
    logger.close()
    board = events(tmp_path)
    assert sorted(board.Tags()["scalars"]) == ["opt/grad norm", "train/train_return"]
    assert [(e.step, e.value) for e in board.Scalars("train/train_return")] == [(1000, 125.0), (2000, 250.0)]


GROUPED = {
    "eval": "eval_return",
    "eval_log": "eval_log_achievement_collect_coal eval_log_steps",
    "policy": """actor_entropy adv adv_std imag_return imag_slow_value return_scale policy_loss value_loss repval_loss
        actor_grad_norm critic_grad_norm expl_imag_return expl_policy_loss disag_loss expl_model_grad_norm""",
    "time": """eval_length eval_episodes train_length train_episodes fps updates updates_per_second replay_steps
        env_restarts video_seconds film_seconds control_ticks deadlines_missed deadlines_met deadline_late_ms
        weights_version weights_age safe_actions train_ratio policy_age""",
    "train": "train_return log_steps log_achievement_collect_coal",
    "world": """image_loss state_loss reward_loss cont_loss dyn_loss rep_loss model_loss loss kl prior_ent post_ent lr
        grad_norm model_grad_norm""",
}


def test_metrics_stand_in_groups_and_the_evaluations_return_is_the_first():
    tags = [tag(name) for names in GROUPED.values() for name in names.split()]
    assert tags == [f"{group}/{name}" for group, names in GROUPED.items() for name in names.split()]
    assert min(tags) == MAIN == "eval/eval_return"  # TensorBoard sorts groups, and names in them


def test_tensorboard_shows_charts_the_config_and_a_row_of_hyperparameters(tmp_path):
    config = {"task": "dummy", "seed": 3, "actor": {"layers": 2, "unimix": 0.01}, "compile": True, "size": [8, 8]}
    logger = Logger(tmp_path / "walker", 0, ("tensorboard",), config, {"actor.layers", "logdir"})
    logger.scalars({"eval_return": 5.0}, 10)
    logger.close()
    board = events(tmp_path / "walker")
    assert "    actor.layers: 2\n" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    (command,) = board.Tensors("command/text_summary")[0].tensor_proto.string_val
    assert all(word in command.decode() for word in map(os.path.basename, sys.argv))
    layout = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    first = Layout.FromString(layout).category[0].chart[0].multiline.tag
    assert [re.search(pattern, MAIN) is not None for pattern in first] == [True]
    plugin = {name: board.SummaryMetadata(f"_hparams_/{name}").plugin_data.content for name in HPARAMS}
    row = HParamsPluginData.FromString(plugin["session_start_info"]).session_start_info
    assert (row.group_name, row.hparams["seed"].number_value) == ("walker", 3)
    assert row.hparams["compile"].string_value == "True" and row.hparams["size"].string_value == "[8, 8]"
    experiment = HParamsPluginData.FromString(plugin["experiment"]).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == [MAIN]
    columns = {info.name: info.differs for info in experiment.hparam_infos}
    assert columns.keys() == row.hparams.keys()
    assert {name for name, first in columns.items() if first} == {"task", "seed", "actor.layers"}


def test_means_are_over_the_updates_that_had_the_metric():
    metrics = Metrics()
    for step, entries in enumerate(
        [{"kl": 1.0, "rare": 8.0}, {"kl": 2.0}, {}, {"kl": 6.0, "late": 5.0}, {"late": 7.0}]
    ):
        metrics.add({name: torch.tensor(value) for name, value in entries.items()}, step)
    metrics.drain()
    assert metrics.means() == {"kl": 3.0, "rare": 8.0, "late": 6.0}
    assert metrics.means() == {}
    metrics.add({"kl": torch.tensor(4.0)}, 5)
    assert metrics.means() == {"kl": 4.0}  # what was before is forgotten


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_the_other_losses():
    metrics = Metrics()
    metrics.add({"kl": torch.tensor(float("nan"))}, 10)  # is no loss
    with pytest.raises(NonFiniteLoss, match=r"not finite at step 20: rew_loss inf, cont_loss 0\.5, grad_norm 1$"):
        values = {"rew_loss": np.inf, "cont_loss": 0.5, "kl": 3.0, "grad_norm": 1.0}
        metrics.add({name: torch.tensor(value) for name, value in values.items()}, 20)


# Videos


@pytest.mark.parametrize("channels", [1, 3])
def test_video_is_a_gif_in_tensorboard(tmp_path, channels):
    frames = np.zeros((5, 16, 24, channels), np.uint8)
    for t in range(5):
        frames[t, :, 4 * t : 4 * t + 4] = 250  # a bar that moves to the right
    logger = Logger(tmp_path)
    written = logger.video("openloop/image", frames, 300, fps=20)
    logger.close()
    (event,) = events(tmp_path).Images("openloop/image")
    assert (event.step, event.width, event.height) == (300, 24, 16)
    assert event.encoded_image_string == written
    gif = event.encoded_image_string
    assert gif.startswith(b"GIF89a")
    decoded = imageio.imread(gif, plugin="pillow", index=..., mode="RGB")
    assert decoded.shape == (5, 16, 24, 3)
    np.testing.assert_allclose(decoded.astype(int), np.broadcast_to(frames, decoded.shape).astype(int), atol=4)
    assert imageio.immeta(gif, plugin="pillow")["duration"] == 50  # milliseconds


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_video_refuses_other_shapes_and_types(tmp_path, frames):
    logger = Logger(tmp_path)
    with pytest.raises(ValueError, match="video clip"):
        logger.video("clip", frames, 0)
    logger.close()


# Scores


def test_scores_are_written_at_once(tmp_path):
    logger = Logger(tmp_path)
    logger.score(500, "train", np.float32(12.5), np.int64(100))
    logger.score(torch.tensor(600), "eval", float("nan"), 50, task="dummy", achievement_wood=np.int32(2))
    assert lines(tmp_path / "scores.jsonl") == [
        {"step": 500, "mode": "train", "score": 12.5, "length": 100},
        {"step": 600, "mode": "eval", "score": "nan", "length": 50, "task": "dummy", "achievement_wood": 2},
    ]
    logger.close()


def test_scores_survive_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from training.logger import Logger; logger = Logger(sys.argv[1])\n"
        "for step in range(3): logger.score(step, 'train', 1.0, 10)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines(tmp_path / "scores.jsonl")] == [0, 1, 2]


# Resuming


@pytest.mark.parametrize("torn", ['{"step": 20, "kl": 0.', '{"step": 20'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
    for name in ("metrics.jsonl", "scores.jsonl"):
        (tmp_path / name).write_text('{"step": 10}\n' + torn)
    logger = Logger(tmp_path, step=10)
    logger.scalars({"kl": 1.0}, 20)
    logger.score(20, "train", 1.0, 5)
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 10}, {"step": 20, "kl": 1.0}]
    assert lines(tmp_path / "scores.jsonl")[1] == {"step": 20, "mode": "train", "score": 1.0, "length": 5}


def test_whole_files_are_left_as_they_are(tmp_path):
    for content in ("", '{"step": 1}\n', '{"step": 1}\n{"step": 2}\n'):
        (tmp_path / "metrics.jsonl").write_text(content)
        Logger(tmp_path).close()
        assert (tmp_path / "metrics.jsonl").read_text() == content
    (tmp_path / "metrics.jsonl").write_text('{"st')
    Logger(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path):
    for start, steps in [(0, (0, 100, 200)), (150, (160, 250))]:
        logger = resumed(tmp_path, start)
        for step in steps:
            logger.scalars({"kl": step + start}, step)
        logger.close()
    curve = [(event.step, event.value) for event in events(tmp_path).Scalars("world/kl")]
    assert curve == [(0, 0), (100, 100), (160, 310), (250, 400)]
    assert len(lines(tmp_path / "metrics.jsonl")) == 5


def test_tensorboard_keeps_the_step_at_which_a_run_is_resumed(tmp_path):
    for start, steps in [(0, (100, 200, 300)), (200, (250,))]:
        logger = resumed(tmp_path, start)
        for step in steps:
            logger.scalars({"kl": step}, step)
        logger.video("clip", np.zeros((2, 8, 8, 3), np.uint8), steps[-1] - 100)
        logger.close()
    assert [event.step for event in events(tmp_path).Scalars("world/kl")] == [100, 200, 250]
    assert [event.step for event in events(tmp_path).Images("clip")] == [200, 150]


def test_a_resumed_run_from_before_there_were_groups_has_whole_curves_in_them(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("kl", 1.0, 100)
    rows = [(100, 1.0), (200, 2.0), (300, 3.0), (200, 4.0), (250, "nan"), (400, 5.0)]  # once resumed at 150
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "kl": v}) + "\n" for s, v in rows) + '{"st')
    for start in (250, 260):
        logger = resumed(tmp_path, start)
        logger.scalars({"kl": float(start)}, start + 10)
        logger.close()
    curve = [(event.step, event.value) for event in events(tmp_path).Scalars("world/kl")]
    assert [step for step, _ in curve] == [100, 200, 250, 260, 270]
    assert [value for _, value in curve if np.isfinite(value)] == [1.0, 4.0, 250.0, 260.0]


# Weights & Biases


def wandb_records(path):
    """Yield the records in the file of an offline run, in the format of LevelDB's log.

    A header of 7 bytes, then blocks of 32 KiB that hold pieces, each with a checksum (4 bytes), a length (2) and a
    type (1): 1 a whole record, 2 its beginning, 3 its middle, 4 its end.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:  # too small for a piece: padding
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(path):
    """Return the history of an offline run: [{name: value}]."""
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_offline_has_the_same_names_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[range(5), :, range(5)] = 250  # a bar that moves to the right
    metrics = {"train_return": 1.5, "opt/grad norm": 2.0}
    logdir, ids = tmp_path / "walker", []
    for start in (0, 100):
        logger = Logger(logdir, start, ("tensorboard", "wandb"), {"seed": 3, "actor": {"layers": 2}})
        logger.scalars(metrics, start + 10)
        logger.video("eval_policy/image", frames, start + 20)  # before the scalars of an earlier step are flushed
        logger.close()
        ids.append((logdir / "wandb_id.txt").read_text())
    wandb.teardown()  # its process writes the last of a file some time after finish(); the end of a program waits too
    assert ids[0] == ids[1]
    files = sorted(logdir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: next(wandb_history(path))["step"])
    assert [path.stem for path in files] == [f"run-{ids[0]}"] * 2
    for start, path in zip((0, 100), files, strict=True):
        video, scalars = wandb_history(path)
        grouped = {"train/train_return": 1.5, "opt/grad norm": 2.0}
        assert {k: v for k, v in scalars.items() if k[0] != "_"} == {"step": start + 10, **grouped}
        assert video["step"] == start + 20
        (gif,) = path.parent.glob("files/media/videos/eval_policy/*.gif")
        assert imageio.imread(gif, plugin="pillow", index=...).shape == frames.shape
        (run,) = (r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run")
        assert (run.run_id, run.project, run.display_name) == (ids[0], "dreamer", "walker")
        config = {item.key or item.nested_key[0]: item.value_json for item in run.config.update}
        assert json.loads(config["seed"]) == 3 and json.loads(config["actor"]) == {"layers": 2}
    assert set(map(tag, metrics)) <= set(events(logdir).Tags()["scalars"])
    assert set(metrics) <= set(lines(logdir / "metrics.jsonl")[0])


def test_texts_and_sounds_go_to_the_boards(tmp_path):
    sound = tmp_path / "sound.wav"
    sound.write_bytes(wav(np.zeros((8, 2), np.float32), 8000))
    logger = Logger(tmp_path / "run")
    logger.text("openloop/said", "| left |", 3)
    logger.audio("openloop/heard", sound, 3)
    logger.close()
    (path,) = (tmp_path / "run").glob("events.*")
    values = {value.tag: value for event in EventFileLoader(str(path)).Load() for value in event.summary.value}
    assert "openloop/said/text_summary" in values
    heard = values["openloop/heard"]
    assert sound.read_bytes() in (heard.audio.encoded_audio_string, *heard.tensor.string_val)

    wandb, logged = pytest.importorskip("wandb"), []
    board = object.__new__(WeightsAndBiases)
    board._run, board._audio, board._html = SimpleNamespace(log=logged.append), wandb.Audio, wandb.Html
    board.text("openloop/said", "| <left> |", 3)
    board.audio("openloop/heard", sound, 3)
    assert [set(entry) for entry in logged] == [{"step", "openloop/said"}, {"step", "openloop/heard"}]
    assert "&lt;left&gt;" in logged[0]["openloop/said"].html


def test_wandb_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    Logger(tmp_path / "a").close()
    with pytest.raises(UserError, match=r"--logger wandb needs a package: pip install -r requirements/wandb.txt"):
        Logger(tmp_path / "b", 0, ("tensorboard", "wandb"))
    assert not (tmp_path / "b").exists()


def test_a_run_that_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    (tmp_path / "old").mkdir()
    for logdir in (tmp_path / "old", tmp_path / "new" / "run"):
        with pytest.raises(UserError, match=r"^--logger wandb: No API key configured\.$"):
            Logger(logdir, 0, ("tensorboard", "wandb"))
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]  # nothing new is left behind


def test_json_lines_are_written_without_any_output(tmp_path):
    logger = Logger(tmp_path, 0, ())
    logger.scalars({"kl": 1.0}, 10)
    logger.video("clip", np.zeros((2, 8, 8, 3), np.uint8), 10)
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 10, "kl": 1.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "scores.jsonl"]
