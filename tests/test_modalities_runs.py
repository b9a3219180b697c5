"""Runs that read and hear: what they write, and what goes on from it; and a kind of the reader's own."""

import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium import spaces

import agents.older
import dreamer
import envs.dmlab
import export
import inference_video
import modalities
import modalities.joint
import training.evaluation
import training.sounds
from agents.acting import ActingStep
from envs import make_env
from envs.spaces import describe
from modalities.text.space import read, vocabulary
from replay.episodes import episode_files
from tests.factories import CONFIGS, ROOT, TOYS, Toy, env_config, initial, make_dreamer, one_line_error, play
from tests.test_atari import make_native
from tests.test_modalities import sequences
from tools import UserError
from training.config import load_config
from training.evaluation import read_aloud
from training.sounds import add_sound, together, wav
from training.videos import write_mp4

WORDS = "--configs multimodal debug --task dummy_all --size 16 16 --steps 60 --eval_episode_num 1 --eval_envs 1"
BYTES = spaces.Box(0, 255, (16,), np.uint8)
QUIET = "--log_level error --encoder.drop 0.1 --text.length 16"


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "all"
    assert dreamer.main(["--logdir", str(path), *WORDS.split(), *QUIET.split()]) == 0
    return path


def streams(path):
    """Return what ffmpeg says of a film."""
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr


def test_what_is_read_and_heard_is_stored_and_shown(logdir):
    with np.load(episode_files(logdir / "train_eps")[0], allow_pickle=False) as episode:
        assert episode["instruction"].dtype == np.int32 and episode["instruction"].shape[1:] == (16,)
        assert read(episode["instruction"][0], vocabulary(load_config([], CONFIGS).text)).startswith("go ")
        assert episode["tone"].shape[1:] == (256, 1) and episode["tone/present"][:4].tolist() == [1, 0, 0, 1]
    assert {"instruction_loss", "tone_loss"} <= set(re.findall(r"\w+_loss", (logdir / "metrics.jsonl").read_text()))
    for key in ("image", "instruction", "tone"):
        assert len(list((logdir / "openloop" / key).glob("*.gif"))) == 1
    (sound,) = (logdir / "openloop" / "tone").glob("*.wav")
    assert sound.read_bytes()[:4] == b"RIFF" and len(sound.read_bytes()) > 8 * 256 * 2 * 2
    (film,) = (logdir / "videos").glob("*.mp4")
    assert "Audio: aac" in streams(film)
    events = b"".join(path.read_bytes() for path in logdir.glob("events.out.tfevents.*"))
    assert b"audio/wav" in events and b"openloop/instruction/text_summary" in events


def test_such_a_run_goes_on_and_its_episodes_train_another(logdir, tmp_path):
    still = [*QUIET.split(), "--eval_episode_num", "0"]
    assert dreamer.main(["--logdir", str(logdir), *WORDS.replace("60", "66").split(), *still]) == 0
    offline = ["--script", "train_offline", "--offline_traindir", str(logdir / "train_eps")]
    words = [*WORDS.replace("60", "8").split(), *still, *offline]
    assert dreamer.main(["--logdir", str(tmp_path / "run"), *words]) == 0


def test_a_trained_agent_takes_strings_and_what_is_missing(logdir):
    agent, image = dreamer.load_agent(logdir, "cpu"), np.zeros((16, 16, 3), np.uint8)
    obs = {"image": image, "opposite": 1, "instruction": "go north"}
    action, _ = agent.act(obs)
    assert action["action"] in range(5)
    assert agent.act({**obs, "tone": None})[0] == action
    tone = np.ones(256, np.float32)
    both = {key: np.stack([value] * 2) for key, value in obs.items()} | {"tone": np.stack([tone, tone])}
    both["instruction"] = ["go north", "go somewhere else entirely"]
    state = agent.act({**both, "tone/present": [True, False]})[1].state
    silent = agent.act(obs)[1].state
    assert torch.equal(silent.deter[0], agent.act({**obs, "tone": tone, "tone/present": False})[1].state.deter[0])
    assert state.deter.shape[0] == 2
    for wrong, words in (
        ({**obs, "instruction": 3}, "instruction: expected text"),
        ({**obs, "opposite": "left"}, "opposite: expected an array of numbers"),
        ({**obs, "tone": np.full(256, np.nan, np.float32)}, "tone is not finite"),
        ({"image": image, "opposite": 1}, "expected an observation with the keys"),
    ):
        assert words in one_line_error(agent.act, wrong)


def test_its_step_is_a_function_of_named_tensors(logdir):
    policy = dreamer.load_agent(logdir, "cpu")
    step = ActingStep(policy.agent, "mode", {"action": torch.nn.Identity()})
    inputs = export.example(step, 1) | export.random_obs(step, 1, torch.Generator().manual_seed(0))
    assert (inputs["obs.instruction"].dtype, inputs["obs.tone"].dtype) == (torch.int32, torch.float32)
    assert step(inputs)["action.action"].shape == (1, 5)
    assert export.observation("instruction", policy)["layout"].startswith("token ids: byte of UTF-8 + 2")
    assert (export.observation("tone", policy)["low"], export.observation("tone", policy)["high"]) == (-1, 1)
    policy.own["observation"] |= {key: describe(BYTES) for key in ("instruction", "tone")}
    assert export.observation("instruction", policy)["layout"] == "token ids: byte + 2, each of the environment's"
    assert "(byte - 128) / 128" in export.observation("tone", policy)["layout"]


def test_films_of_such_an_agent_have_sound(logdir, tmp_path):
    argv = ["--checkpoint", str(logdir), "--episodes", "1", "--openloop", "--output", str(tmp_path)]
    assert inference_video.main(argv) == 0
    films = {path.name: streams(path) for path in tmp_path.glob("*.mp4")}
    assert {"episode_000_openloop_tone.mp4", "episode_000_openloop_instruction.mp4"} <= films.keys()
    heard = {name for name, said in films.items() if "Audio: aac" in said}
    assert heard == {name for name in films if "tone.mp4" in name or "score" in name}


def test_a_run_from_before_there_were_texts_reads_none(tmp_path):
    config = load_config([], CONFIGS)
    config.save(tmp_path / "new.yaml")
    lines = (tmp_path / "new.yaml").read_text().splitlines()
    old = [line for line in lines if not re.match(r"  (text|audio)_keys:", line)]
    (tmp_path / "old.yaml").write_text("\n".join(old))
    keys = [load_config([], CONFIGS, tmp_path / name).encoder.text_keys for name in ("old.yaml", "new.yaml")]
    assert keys == ["", ".*"]


def test_sounds_become_a_wav_and_gaps_are_silent():
    sound, samples = together([np.full(4, 192, np.uint8), None, np.full(4, 128, np.uint8)], 3)
    assert samples == 4 and sound[:, 0].tolist() == [0.5] * 4 + [0.0] * 8
    assert wav(sound, 8000)[-24:-16] == np.full(4, 0.5 * 32767).astype("<i2").tobytes()
    assert together([None, None], 2) == (None, 0)


@pytest.mark.parametrize("frames, samples", [(1, 2), (3, 2), (30, 1), (4, 512)])
def test_a_film_keeps_its_frames_however_short_its_sound_is(tmp_path, frames, samples):
    path = tmp_path / "film.mp4"
    write_mp4(path, [np.full((32, 32, 3), shade, np.uint8) for shade in range(frames)], fps=20)
    add_sound(path, np.zeros((frames * samples, 1), np.float32), samples * 20)
    assert imageio_ffmpeg.count_frames_and_secs(path)[0] == frames
    assert "Audio: aac" in streams(path) or frames * samples < 10  # which ffmpeg makes nothing of


def test_a_film_that_gets_no_sound_stays_silent(tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    write_mp4(path, [np.zeros((32, 32, 3), np.uint8)], fps=20)
    whole = path.read_bytes()
    monkeypatch.setattr(training.sounds, "wav", lambda sound, rate: b"no sound")
    with pytest.raises(OSError, match="gets no sound"):
        add_sound(path, np.zeros((4, 1), np.float32), 40)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]

    def film(*args, sounds):
        sounds.append(np.zeros(4, np.float32))
        return [np.zeros((32, 32, 3), np.uint8)], [1.0]

    said, logger = [], MagicMock()
    monkeypatch.setattr(training.evaluation, "film", film)
    out = SimpleNamespace(logdir=tmp_path, logger=logger, say=lambda *words: said.append(words))
    training.evaluation.record_film(None, None, None, "mode", out, 7)
    (kept,) = (tmp_path / "videos").iterdir()
    assert imageio_ffmpeg.count_frames_and_secs(kept)[0] == 1 and logger.video.called
    assert [level for level, _ in said] == ["warning", "info"] and "no sound: " in said[0][1]


def test_a_table_of_texts_has_one_line_each_and_nothing_that_moves_the_cursor():
    table = read_aloud([[("a\x1b[2J\u202eb", "c|d\n`e`")]], 1).splitlines()
    assert table[-1] == r"| 0 | 0 | sees | `a\x1b[2J\u202eb` | `c d e` |"


def test_other_sentences_in_the_file_of_embeddings_are_refused(tmp_path, capfd):
    TOYS[:] = [Toy(spaces.Text(9), lambda step: "go" if step % 2 else "stop")]
    path, logdir, words = tmp_path / "known.npz", tmp_path / "run", np.array(["go", "stop"])
    np.savez(path, sentences=words, vectors=np.eye(2))
    task = f"--configs debug --task custom_tests.factories:newest_toy --text.embeddings {path} --steps"
    rest = "40 --eval_episode_num 0 --log_level error"
    argv = [*f"{task} {rest}".split(), "--logdir", str(logdir)]
    assert dreamer.main(argv) == 0
    np.savez(path, sentences=words[::-1], vectors=np.eye(2))
    capfd.readouterr()
    assert dreamer.main([word.replace("40", "60") if word == "40" else word for word in argv]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"dreamer.py: --text.embeddings {path}: its content is not what the agent has learned with")
    assert "its content is not" in one_line_error(dreamer.load_agent, logdir, "cpu")


# ---------------------------------------------------------------------------
# Suites that have them


def test_babyai_tells_its_mission_and_a_mission_that_never_changes_is_left_out():
    env = make_env(env_config("minigrid_BabyAI-GoToLocal-v0"), "train", 0)
    words = {read(env.reset()["mission"], vocabulary(load_config([], CONFIGS).text)) for _ in range(6)}
    assert env.obs_space.keys() == {"image", "direction", "mission"}
    assert len(words) > 1 and all(text.startswith("go to ") for text in words)
    gym = make_env(env_config("gym_BabyAI-GoToLocal-v0"), "train", 0)
    assert gym.obs_space["mission"].shape == (64,)
    assert make_env(env_config("minigrid_DoorKey-5x5-v0"), "train", 0).obs_space.keys() == {"image", "direction"}


def test_atari_is_heard_frame_by_frame():
    env = make_native("pong", sound=True)
    first = env.reset()["sound"].copy()
    assert first.shape == (4 * 512,) and (first[: 3 * 512] == 128).all()
    sounds = [env.step({"action": 1})["sound"].copy() for _ in range(60)]
    heard = np.stack(sounds).reshape(-1, 4, 512)
    assert (heard[heard != 128] > 128).all() and (heard != 128).any()
    assert "sound" not in make_native("pong").obs_space


def test_dmlab_tells_the_instructions_of_its_language_levels(monkeypatch):
    from tests.test_dmlab import Lab

    monkeypatch.setitem(sys.modules, "deepmind_lab", type("module", (), {"Lab": Lab}))
    env = make_env(env_config("dmlab_language_execute_random_task"), "train", 0)
    assert Lab.made[-1].names == ["RGB_INTERLEAVED", envs.dmlab.INSTRUCTION]
    assert [read(obs["instruction"], vocabulary(load_config([], CONFIGS).text)) for obs in play(env, 2)] == [
        "go on 0",
        "go on 1",
        "go on 2",
    ]
    lab = Lab.made[-1]
    monkeypatch.setattr(
        lab,
        "observations",
        lambda: {"RGB_INTERLEAVED": np.zeros((64, 64, 3), np.uint8), envs.dmlab.INSTRUCTION: b"go \xff"},
    )
    assert read(env.reset()["instruction"], vocabulary(load_config([], CONFIGS).text)) == "go \ufffd"


# ---------------------------------------------------------------------------
# A kind of one's own


def test_the_kind_that_the_docs_add_learns(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "modalities.md").read_text()
    folder = tmp_path / "touch"
    folder.mkdir()
    for name in ("__init__", "space", "nets"):
        code = re.search(rf"`modalities/touch/{name}\.py`[^`]*```python\n(.*?)```", text, re.DOTALL)[1]
        (folder / f"{name}.py").write_text(code)
    pad = re.search(r"`pad\.py`:\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "pad_of_docs.py").write_text(pad)
    key = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    configs = CONFIGS.read_text().replace("    fusion:", f"{key}    fusion:", 1)
    (tmp_path / "configs.yaml").write_text(configs)
    monkeypatch.setattr(modalities, "__path__", [*modalities.__path__, str(tmp_path)])
    for module in (modalities, modalities.joint, agents.older):
        monkeypatch.setattr(module, "MODALITIES", ("vector", "image", "text", "audio", "touch"))
    monkeypatch.syspath_prepend(tmp_path)

    words = [
        "--configs",
        "multimodal",
        "debug",
        "--task",
        "custom_pad_of_docs:Pad",
        "--opt.lr",
        "1e-2",
        "--opt.warmup",
        "1",
    ]
    config = load_config(words, tmp_path / "configs.yaml")
    env = make_env(config, "train", 0)
    assert modalities.describe(env.obs_space) == {"skin": "touch 8x8"}
    agent = make_dreamer(env.obs_space, env.act_space, config)
    batch = sequences(env)
    losses = [agent.update(batch, initial(agent))[1]["skin_loss"].item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert [panel.shape for panel in agent.report(batch, 4)["skin"]] == [(3, 8, 8, 8, 1)] * 3
    again = make_dreamer(env.obs_space, env.act_space, config)
    again.load_state_dict(agent.state_dict())
    with pytest.raises(UserError, match="touch is a Box"):
        modalities.space("touch").converter("x", env.act_space["action"], config)
