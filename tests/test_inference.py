"""Test inference_video.py and load_agent on checkpoints of tiny runs; every video is decoded again."""

import json
import os
import pathlib
import shutil

import cv2
import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import dreamer
import inference_video
from agents.dreamer import Dreamer
from envs import make_env
from inference_video import BORDER, IMAGINED, SEEN
from tools import UserError, derive_seed
from training.config import load_config


class Blind(gymnasium.Env):
    """Like dummy_vector, but without rendering."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


def train(logdir, words):
    argv = ["--configs", "debug", "--logdir", str(logdir), "--eval_every", "0", "--log_level", "error", *words.split()]
    assert dreamer.main(argv) == 0
    return logdir


@pytest.fixture(scope="module")
def multi(tmp_path_factory):
    """Return a run on images, vectors and classes, with two actions."""
    return train(tmp_path_factory.mktemp("runs") / "multi", "--size 16 16 --steps 60 --opt.warmup 0")


@pytest.fixture(scope="module")
def vector(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "vector", "--task dummy_vector --steps 60")


def film(output, checkpoint, words=""):
    """Run it on one checkpoint, for one episode by default; it must succeed. Return its scores.json."""
    argv = ["--checkpoint", str(checkpoint), "--output", str(output), "--episodes", "1", *words.split()]
    assert inference_video.main(argv) == 0
    return json.loads((output / "scores.json").read_text())


def decode(path):
    """Return frames (T, H, W, 3), checked not to be blank. GIFs have 10 frames per second."""
    frames = imageio.imread(path)
    if path.suffix == ".gif":  # of equal frames in a row it holds one, for as long as all of them
        times = [imageio.immeta(path, index=index)["duration"] for index in range(len(frames))]
        frames = frames.repeat(np.array(times) // 100, 0)
    assert frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[-1] == 3
    assert frames.max() > 128 and (np.diff(frames.astype(int), axis=0) != 0).any()
    return frames


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------
# Videos


def test_every_episode_is_a_video_named_by_its_score(multi, tmp_path, capsys):
    result = film(tmp_path / "videos", multi / "latest.pt", "--episodes 3 --format both --mode sample --fps 10")
    assert names(tmp_path / "videos") == sorted([*result["videos"], "scores.json"]) and len(result["videos"]) == 6
    for index, (score, length) in enumerate(zip(result["scores"], result["lengths"], strict=True)):
        for kind in ("mp4", "gif"):
            frames = decode(tmp_path / "videos" / f"episode_{index:03d}_score_{score:.1f}.{kind}")
            assert frames.shape == (length + 1, 16, 16, 3)
    assert result["task"] == "dummy_multi" and result["step"] == 60 and result["episodes"] == 3
    assert result["mean"] == pytest.approx(np.mean(result["scores"])) and result["std"] == np.std(result["scores"])
    assert (result["min"], result["max"]) == (min(result["scores"]), max(result["scores"]))
    out, error = capsys.readouterr()
    assert f"{result['mean']:.1f}" in out and f"({min(result['lengths'])} to {max(result['lengths'])})" in out
    assert "3/3" in error and "score=" in error  # the progress bar


def test_the_score_is_the_sum_of_rewards(multi, tmp_path):
    result = film(tmp_path, multi, "--time_limit 3 --seed 7")
    assert result["lengths"] == [3] and result["seed"] == 7
    config = load_config(["--config", str(multi / "config.yaml"), "--seed", "7", "--time_limit", "3"], dreamer.CONFIGS)
    env, agent = make_env(config, "eval", 0), dreamer.load_agent(multi, "cpu").agent
    carry = agent.initial(1)
    env.reset()  # the film's trial shot
    agent.generators["act"].manual_seed(derive_seed(7, 5, 0))
    obs, score = env.reset(), 0.0
    while not obs["is_last"]:
        actions, carry, _ = agent.act({key: np.asarray(value)[None] for key, value in obs.items()}, carry, "mode")
        obs = env.step({key: value[0] for key, value in actions.items()})
        score += obs["reward"]
    assert result["scores"] == [pytest.approx(score)]


def test_videos_have_the_size_and_speed_asked_for(vector, tmp_path):
    (name,) = film(tmp_path, vector, "--size 40 50 --fps 12")["videos"]
    assert decode(tmp_path / name).shape == (21, 40, 50, 3)
    assert imageio.immeta(tmp_path / name, plugin="FFMPEG")["fps"] == 12
    (name,) = film(tmp_path, vector, "--size 33 47 --format gif --fps 10")["videos"]
    assert decode(tmp_path / name).shape == (21, 33, 47, 3)
    assert imageio.immeta(tmp_path / name, index=0)["duration"] == 100
    (name,) = film(tmp_path, vector, "--size 33 47")["videos"]
    assert decode(tmp_path / name).shape == (21, 34, 48, 3)  # H.264 takes even sizes only


def test_seed_and_mode_decide_the_scores(vector, tmp_path):
    words = ["--seed 1 --mode mode", "--seed 1 --mode mode", "--seed 2 --mode mode", "--seed 1 --mode sample"]
    results = [film(tmp_path / str(index), vector, line) for index, line in enumerate(words)]
    first, again, *others = [result["scores"] for result in results]
    assert first == again and first not in others
    assert [result["mode"] for result in results] == ["mode", "mode", "mode", "sample"]


def test_gym_environments_are_filmed_at_their_own_resolution_or_resized(tmp_path):
    words = "--use-random-agent --task gym_CartPole-v1 --time_limit 5"
    (name,) = film(tmp_path, "none", words)["videos"]
    assert decode(tmp_path / name).shape == (6, 400, 600, 3)
    (name,) = film(tmp_path, "none", f"{words} --size 100 200")["videos"]
    assert decode(tmp_path / name).shape == (6, 100, 200, 3)


def test_dm_control_draws_at_any_size():
    env = make_env(load_config(["--task", "dmc_cartpole_balance"], dreamer.CONFIGS), "eval", 0)
    seen = env.reset()["image"]  # at the model's size, in a buffer that is too small for what follows
    small = env.render()
    large = env.render((300, 400))
    assert seen.shape == (64, 64, 3) and small.shape == (256, 256, 3) and large.shape == (300, 400, 3)
    shrunk = cv2.resize(env.render((320, 320)), (256, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(shrunk.astype(int) - small).mean() < 4
    env.close()


def test_a_random_agent_needs_no_checkpoint(tmp_path, multi):
    result = film(tmp_path, "none", "--use-random-agent --configs debug --task dummy_discrete --episodes 2")
    assert result["checkpoint"] is None and result["mode"] == "random" and len(result["scores"]) == 2


def test_several_checkpoints_are_compared(multi, tmp_path, capsys):
    shutil.copy(multi / "latest.pt", multi / "early.pt")
    argv = ["--checkpoint", str(multi), str(multi / "early.pt"), "none", "--use-random-agent", "--episodes", "2"]
    assert inference_video.main([*argv, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "scores.json").read_text())
    assert [result["agent"] for result in results] == ["0_multi", "1_early", "2_random"]
    assert names(tmp_path) == ["0_multi", "1_early", "2_random", "scores.json"]
    assert results[0]["scores"] == results[1]["scores"] != results[2]["scores"]
    for result in results:
        assert json.loads((tmp_path / result["agent"] / "scores.json").read_text()) == result
        assert names(tmp_path / result["agent"]) == sorted([*result["videos"], "scores.json"])
    table = capsys.readouterr().out.splitlines()[:4]
    assert [line.split()[0] for line in table] == ["agent", "0_multi", "1_early", "2_random"]
    assert [line.split()[3] for line in table[1:]] == [f"{result['mean']:.1f}" for result in results]


def test_open_loop_shows_truth_model_and_error(multi, tmp_path):
    result = film(tmp_path, multi, "--openloop --format gif --fps 10 --episodes 2 --mode sample")
    for index, length in enumerate(result["lengths"]):
        frames = decode(tmp_path / f"episode_{index:03d}_openloop_image.gif")
        whole, rest = divmod(length + 1, 8)  # batch_length: the chunks
        chunks = [8] * whole + [rest] * (rest > 1)
        width = 192 + 2 * BORDER
        assert frames.shape == (sum(chunks), width, 3 * width, 3)
        borders = [SEEN if step < chunk // 2 else IMAGINED for chunk in chunks for step in range(chunk)]
        assert np.abs(frames[:, 1, 1].astype(int) - borders).max() < 12  # a GIF has few colors
        truth = frames[:, BORDER:-BORDER, BORDER : width - BORDER]
        played = decode(tmp_path / f"episode_{index:03d}_score_{result['scores'][index]:.1f}.gif")
        enlarged = played[: sum(chunks)].repeat(12, 1).repeat(12, 2)
        assert np.abs(truth.astype(int) - enlarged).mean() < 8  # dummy environments render what they observe


def test_open_loop_of_vectors_shows_curves(vector, tmp_path):
    result = film(tmp_path, vector, "--openloop --format gif --fps 10")
    frames = decode(tmp_path / "episode_000_openloop_state.gif")
    borders = frames[:, 1, 1].astype(int)
    assert len(frames) == 21 and min(frames.shape[1:3]) > 192 and result["lengths"] == [20]
    assert np.abs(borders[:4] - SEEN).max() < 12 and np.abs(borders[4:8] - IMAGINED).max() < 12


def test_a_random_agent_says_why_it_has_no_open_loop(tmp_path, multi, capfd):
    argv = ["--checkpoint", str(multi), "none", "--use-random-agent", "--openloop", "--episodes", "1"]
    assert inference_video.main([*argv, "--output", str(tmp_path)]) == 0
    assert "no open-loop video of 1_random: a random agent predicts nothing\n" in capfd.readouterr().err
    assert any("openloop" in name for name in names(tmp_path / "0_multi"))
    assert not any("openloop" in name for name in names(tmp_path / "1_random"))


def test_a_caption_tells_step_and_score(vector, tmp_path):
    for words in ("", "--caption"):
        film(tmp_path / f"a{words}", vector, f"--size 240 240 --format gif --fps 10 {words}")
    plain, drawn = (decode(next((tmp_path / folder).glob("*.gif"))) for folder in ("a", "a--caption"))
    different = (np.abs(plain.astype(int) - drawn) > 40).any((0, 3))
    assert plain.shape == drawn.shape and different[:20, :100].any() and not different[30:].any()


def test_an_agent_acts_alike_whether_its_expectations_are_filmed_or_not(multi, tmp_path, monkeypatch):
    act, done = Dreamer.act, {}

    def noted(agent, *args):
        result = act(agent, *args)
        done.setdefault(words, []).append(np.concatenate([*result[0].values()], 1).copy())
        return result

    monkeypatch.setattr(Dreamer, "act", noted)
    for words in ("--mode sample --episodes 2", "--mode sample --episodes 2 --openloop"):
        film(tmp_path / str(len(done)), multi, words)
    without, filmed = map(np.concatenate, done.values())
    assert np.array_equal(without, filmed)


# ---------------------------------------------------------------------------
# Mistakes of the user: one line, status 2, nothing written


def refuses(words, said, output, capfd):
    assert inference_video.main([*map(str, words), "--output", str(output), "--episodes", "1"]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("inference_video.py: ") and error.count("\n") == 1, error
    assert said in error
    assert not output.exists()


MISTAKES = {
    "--checkpoint /no/such/file.pt": "/no/such/file.pt: no such checkpoint",
    "": "give --checkpoint",
    "--use-random-agent": "needs --task",
    "--use-random-agent --task dummy_vektor": "did you mean 'vector'?",
    "--use-random-agent --task custom_tests.test_inference:Blind": "Blind cannot be rendered",
    "--use-random-agent --task dummy_vector --episods 3": "did you mean --episodes?",
    "--use-random-agent --task dummy_vector --nonsense 3": "--nonsense: unknown key",
    "--use-random-agent --task dummy_vector --format avi": "invalid choice: 'avi'",
    "--use-random-agent --task dummy_vector --fps 0": "invalid positive float value: '0'",
    "--use-random-agent --task dummy_vector --size 64": "expected 2 arguments",
    "--use-random-agent --task dummy_vector --seed x": "expected a whole number",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(words, tmp_path, capfd):
    refuses(words.split(), MISTAKES[words], tmp_path / "videos", capfd)


@pytest.mark.parametrize("words", ["--device cuda:99", "--mode best", "--task dummy_discrete", "--use-random-agent"])
def test_a_mistake_with_a_good_checkpoint_is_one_line(words, vector, tmp_path, capfd):
    refuses(["--checkpoint", vector, *words.split()], "", tmp_path / "videos", capfd)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x" * 100])
def test_a_corrupt_checkpoint_is_one_line(damage, vector, tmp_path, capfd):
    path = tmp_path / "latest.pt"
    path.write_bytes(damage((vector / "latest.pt").read_bytes()))
    shutil.copy(vector / "config.yaml", tmp_path)
    refuses(["--checkpoint", path], f"{path} cannot be loaded: ", tmp_path / "videos", capfd)


def test_a_checkpoint_without_its_config_is_one_line(vector, tmp_path, capfd):
    shutil.copy(vector / "latest.pt", tmp_path)
    refuses(["--checkpoint", tmp_path], "config.yaml: No such file", tmp_path / "videos", capfd)


def test_a_wrong_task_names_both_shapes(multi, tmp_path, capfd):
    words = ["--checkpoint", multi, "--task", "dummy_vector"]
    refuses(words, "vector state is (2,) there and (3,) here", tmp_path / "videos", capfd)
    shutil.copytree(multi, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("- 16\n- 16\n", "- 32\n- 16\n"))
    said = "image image is (16, 16, 3) there and (32, 16, 3) here"
    refuses(["--checkpoint", tmp_path / "run"], said, tmp_path / "videos", capfd)


def test_an_output_that_cannot_be_written_is_one_line(vector, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    refuses(["--checkpoint", vector], f"--output {tmp_path}/file/videos: ", tmp_path / "file" / "videos", capfd)
    if os.getuid() == 0 and pathlib.Path("/proc/self").exists():  # who is root may write to any real folder
        assert inference_video.main(["--checkpoint", str(vector), "--output", "/proc/self"]) == 2
        assert capfd.readouterr().err.splitlines()[-1].startswith("inference_video.py: --output /proc/self: ")


def test_nothing_half_written_stays(vector, tmp_path, monkeypatch):
    frame, shots = inference_video.Player.frame, iter(range(30))  # one to try, 21 of the first episode, then some

    def interrupted(player):
        if next(shots, None) is None:
            raise KeyboardInterrupt
        return frame(player)

    monkeypatch.setattr(inference_video.Player, "frame", interrupted)
    argv = ["--checkpoint", str(vector), "--output", str(tmp_path), "--episodes", "2"]
    assert inference_video.main(argv) == 130
    (name,) = names(tmp_path)
    assert name.startswith("episode_000_score_") and len(decode(tmp_path / name)) == 21


# ---------------------------------------------------------------------------
# load_agent

OBS = {
    "image": np.full((16, 16, 3), 100, np.uint8),
    "state": np.array([0.5, -0.2], np.float32),
    "phase": np.int32(1),
}


def test_one_observation_or_a_batch(multi):
    agent = dreamer.load_agent(multi, "cpu")
    results = []
    for batch in (False, True):
        obs, state = {key: value[None] if batch else value for key, value in OBS.items()}, None
        agent.agent.generators["act"].manual_seed(0)
        for _ in range(3):
            action, state = agent.act(obs, state)
            assert {key: np.shape(value) for key, value in action.items()} == {
                "mode": (1,) * batch,
                "move": (1,) * batch + (2,),
            }
        results.append(action)
    assert all(np.array_equal(results[0][key], results[1][key][0]) for key in results[0])


def test_memory_is_carried_and_is_first_may_be_left_out(vector):
    agent = dreamer.load_agent(vector / "latest.pt", "cpu")
    obs = {"state": np.array([0.5, -0.2, 1], np.float32)}
    _, first = agent.act(obs, None)

    def deter(obs, memory):
        agent.agent.generators["act"].manual_seed(0)
        return agent.act(obs, memory)[1].state.deter

    assert not torch.equal(deter(obs, first), deter(obs, None))
    assert torch.equal(deter(obs, first), deter({**obs, "is_first": np.False_}, first))
    assert torch.equal(deter(obs, None), deter({**obs, "is_first": np.True_}, first))


@pytest.mark.parametrize(
    "obs, said",
    [
        ({"state": np.zeros(3)}, "expected an observation with the keys"),
        (np.zeros(3), "got ndarray"),
        (None, "got NoneType"),
        ({**OBS, "state": np.zeros(5)}, r"observation state: expected shape \(2,\), got \(5,\)"),
        ({**OBS, "image": np.zeros((8, 8, 3), np.uint8)}, r"observation image: expected shape \(16, 16, 3\)"),
    ],
)
def test_an_observation_that_the_agent_was_not_trained_on_is_refused(multi, obs, said):
    with pytest.raises(ValueError, match=said):
        dreamer.load_agent(multi, "cpu").act(obs)


def test_another_mode_of_acting_is_refused(multi):
    with pytest.raises(ValueError, match="mode 'best' is none of"):
        dreamer.load_agent(multi, "cpu").act(OBS, mode="best")


def test_actions_are_within_what_an_environment_takes(vector, monkeypatch):
    agent = dreamer.load_agent(vector, "cpu")
    monkeypatch.setattr(agent.agent, "act", lambda *args: ({"action": np.float32([[7, -0.5], [0.25, -3]])}, (), None))
    action, _ = agent.act({"state": np.zeros((2, 3))})
    assert action["action"].tolist() == [[1.0, -0.5], [0.25, -1.0]]


def test_load_agent_needs_no_environment(tmp_path, monkeypatch, vector):
    monkeypatch.setattr("envs.make_env", lambda *_: pytest.fail("an environment was made"))
    agent = dreamer.load_agent(str(vector), torch.device("cpu"))
    saved = torch.load(vector / "latest.pt", weights_only=True)["agent"]
    state = agent.agent.state_dict()
    assert state["specs"] == saved["specs"] and state["signature"] == saved["signature"]


def test_a_single_class_is_one_observation(tmp_path):
    agent = dreamer.load_agent(train(tmp_path, "--task dummy_discrete --steps 20"), "cpu")
    assert agent.act({"position": np.int32(2)})[0]["action"] in (0, 1)
    assert agent.act({"position": np.array([2, 3, 4])})[0]["action"].shape == (3,)


def test_an_agent_of_another_size_or_of_other_classes_is_refused(vector, tmp_path):
    shutil.copytree(vector, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("deter: 32", "deter: 64"))
    with pytest.raises(UserError, match=r"is \(.*\) there and \(.*\) here"):
        dreamer.load_agent(tmp_path, "cpu")
    agent = dreamer.load_agent(vector, "cpu").agent
    saved = agent.state_dict()
    saved["specs"]["action"]["classes"] = {"action": [2]}
    with pytest.raises(UserError, match=r"action classes: {'action': \[2\]} there and {} here"):
        agent.load_state_dict(saved)


def test_checkpoints_without_specs_resume_but_tell_load_agent_too_little(vector, tmp_path):
    shutil.copytree(vector, tmp_path, dirs_exist_ok=True)
    saved = torch.load(tmp_path / "latest.pt", weights_only=True)
    del saved["agent"]["specs"]
    torch.save(saved, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="older version"):
        dreamer.load_agent(tmp_path, "cpu")
    train(tmp_path, "--task dummy_vector --steps 70")
    dreamer.load_agent(tmp_path, "cpu")
