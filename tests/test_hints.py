"""What is said to users who write what other code calls it."""

import re

import pytest

from envs.errors import unknown as unknown_name
from envs.names import check_task
from envs.tasks import ALIASES, SUITES, split_task
from tools import UserError, nearest, plain
from training.config import CONFIGS, key_meant, load_config
from training.hints import FOREIGN, SECTIONS, VALUES
from training.settings import find

SCHEMA = load_config([], CONFIGS)
PRESETS = ("debug", "quickstart", "size12m", "size1m", "size25m", "size50m", "size100m", "size200m", "size400m")


def said(*words):
    """Return what is said of a command line, one line."""
    with pytest.raises(UserError) as caught:
        load_config(list(words), CONFIGS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Keys


@pytest.mark.parametrize("name", FOREIGN)
def test_every_foreign_name_leads_to_a_key_and_is_none(name):
    words = FOREIGN[name].partition(" (")[0].split(" ")
    assert name == plain(name) and not find(SCHEMA._settings, name)
    assert words[0] in ("configs", "config") or find(SCHEMA._settings, words[0]), FOREIGN[name]
    if len(words) > 1 and not words[1].startswith(("<", "cuda:N")) and "<" not in words[1]:
        load_config([f"--{words[0]}", *words[1:]], CONFIGS)


def test_every_foreign_section_and_value_is_one_of_ours():
    for section in SECTIONS.values():
        assert section in SCHEMA.to_dict()
    for key, values in VALUES.items():
        for value, text in values.items():
            assert text in said(f"--{key}", value), (key, value)


@pytest.mark.parametrize(
    "flag, meant",
    {
        "--lr": "--opt.lr?",
        "--learning-rate": "--opt.lr?",
        "--learning_rate": "--opt.lr?",
        "--gamma": "--horizon (1 / (1 - gamma))?",
        "--discount": "--horizon (1 / (1 - discount))?",
        "--env": "--task?",
        "--env-id": "--task gym_<id>?",
        "--resume": "--logdir (the same command on the same logdir goes on)?",
        "--total-timesteps": "--steps?",
        "--total_timesteps": "--steps?",
        "--run.steps": "--steps?",
        "--run.envs": "--envs?",
        "--algo.total_steps": "--steps?",
        "--algo.per_rank_batch_size": "--batch_size?",
        "--num-envs": "--envs?",
        "--Batch-Size": "--batch_size?",
        "--BatchSize": "--batch_size?",
        "--rssm_deter": "--rssm.deter?",
        "--dyn_deter": "--rssm.deter?",
        "--deter": "--rssm.deter?",
        "--agent.dyn.rssm.deter": "--rssm.deter?",
        "--agent.enc.simple.depth": "--encoder.depth?",
        "--agent.dec.simple.depth": "--decoder.depth?",
        "--agent.policy.units": "--actor.units?",
        "--agent.opt.lr": "--opt.lr?",
        "--agent.loss_scales.rec": "--loss_scales.rec?",
        "--replay.size": "--dataset_size?",
        "--jax.platform": "--device?",
        "--units": "--encoder.units (--help units lists others)?",
        "--actor": "--actor.dist?",
        "--actor.layer": "--actor.layers?",
        "--no-compile": "--compile false?",
        "--noparallel": "--parallel false?",
        "--capture-video": "--video_pred_log?",
        "--track": "--logger wandb?",
        "--imag_gradient": "--actor.grad?",
        "--mlp_keys": "--encoder.mlp_keys?",
        "--time-limit": "--time_limit?",
        "--sticky": "--atari.sticky?",
        "--preset": "--configs?",
        "--modl_opt.lr": "--model_opt.lr?",
        "--opt": "--optimizer adam?",
        "--use_amp": "--precision bf16?",
        "--algo.horizon": "--imag_horizon?",
        "--agent.horizon": "--horizon?",
        "--n_steps": "--train_ratio (updates follow each agent step: there are no rollouts of n steps)?",
    }.items(),
)
def test_a_flag_of_other_code_is_answered_with_ours(flag, meant):
    assert said(flag, "1") == f"{flag}: unknown key, did you mean {meant}"


@pytest.mark.parametrize("flag", ["--qwxz", "--wandb_project_entity_xyz"])
def test_what_is_like_nothing_gets_no_guess(flag):
    assert said(flag, "1") == f"{flag}: unknown key (--help lists all)"


def test_a_word_that_belongs_to_no_flag_is_explained():
    assert said("quickstart") == "quickstart: stray argument, did you mean --configs quickstart?"
    assert said("env=x").endswith("options are given as --key value: did you mean --task?")
    assert said("exp=dreamer_v3").endswith("did you mean --configs (dreamerv2, dreamerv1; DreamerV3 is the default)?")
    assert said("steps=1").endswith("did you mean --steps?") and said("-steps", "1").endswith("did you mean --steps?")
    assert "after --logdir my: a value with spaces, or with * in it, is put in quotes" in said("--logdir", "my", "runs")
    assert "after --encoder.mlp_keys agents:" in said("--encoder.mlp_keys", "agents", "behaviors")


def cells():
    """Yield flags and keys of other code that docs/migrate.md names, each with its right cell."""
    for line in (CONFIGS.parent / "docs" / "migrate.md").read_text().splitlines():
        row = line.startswith("| ") and not line.startswith("| there")
        _, left, right = line.split("|", 2) if row else ("", "", "")
        for code in re.findall("`([^`]*)`", left):
            if code.startswith("--"):
                name, _, value = code.partition(" ")
                yield [name, value or "1"], right
            elif re.fullmatch(r"[a-z_.]+=.*|[a-z]+[._][a-z_.]+", code) and not code.endswith(".jsonl"):
                for word in code.split(" "):
                    yield [word if "=" in word else f"{word}=1"], right


NO_FLAGS = {"model.save=1", "model.load=1", "dreamer_v2=1", "dreamer_v1=1"}  # calls and values


@pytest.mark.parametrize("words, right", [cell for cell in cells() if cell[0][0] not in NO_FLAGS])
def test_what_the_page_translates_works_or_leads_to_what_it_says(words, right):
    name = words[0].partition("=")[0]
    suite = ["--task", "dummy_vector"] if name.startswith("--env.") else []
    try:
        check_task(load_config([*words, *suite], CONFIGS), key_meant)
        message = ""
    except UserError as error:
        message = str(error)
    if (right.startswith(" the same") and "command" not in right) or f"`{name}" in right:
        assert not message or message.startswith(
            (f"{name}: expected", f"{name} 1: unknown preset", "unknown suite '1'")
        )
    else:
        assert "did you mean --" in message
        assert re.search(r"did you mean (--[\w.]+)", message)[1] in re.findall(r"--[\w.]+", right), message


# Presets and files


def test_presets_that_do_not_exist_are_explained(tmp_path):
    assert said("--configs", "defaults") == (
        "--configs defaults: unknown preset: the defaults always lie below, leave it out"
    )
    assert said("--configs", "dmc").endswith("did you mean dmc_proprio?")
    assert said("--configs", "Size-12M").endswith("did you mean size12m?")
    file = tmp_path / "mine.yaml"
    file.write_text("cave: {steps: 3}\n")
    assert load_config(["--configs", "cave", "--config", str(file)], CONFIGS).steps == 3  # as --presets would


def test_a_file_of_another_version_is_told_what_to_delete(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("steps: 3\nreset_every: 0\n")
    assert said("--config", str(file)).endswith("; if another version wrote it, delete it there")


# Values


def test_a_truth_needs_no_word():
    config = load_config(["--parallel", "--compile", "false", "--disag_log"], CONFIGS)
    assert (config.parallel, config.compile, config.disag_log) == (True, False, True)
    assert config.explicit == {"parallel", "compile", "disag_log"}


def test_a_choice_may_be_written_as_a_number_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("precision: 32\n")
    assert load_config(["--config", str(file)], CONFIGS).precision == "32"
    file.write_text("precision: 16\n")
    assert said("--config", str(file)).endswith("(half precision is bf16 here)")


def test_a_run_without_evaluation_may_be_asked_for_in_two_ways():
    assert load_config(["--eval_envs", "0"], CONFIGS).eval_envs == 0
    assert load_config(["--eval_episode_num", "0"], CONFIGS).eval_episode_num == 0


# Tasks

MEANT = {
    "CartPole-v1": "gym_CartPole-v1",
    "CartPole": "gym_CartPole-v1",
    "cartpole-V1": "gym_CartPole-v1",
    "gym:CartPole-v1": "gym_CartPole-v1",
    "gymnasium_CartPole-v1": "gym_CartPole-v1",
    "LunarLander-v2": "gym_LunarLander-v3",
    "walker_walk": "dmc_walker_walk",
    "walker-walk": "dmc_walker_walk",
    "dm_control/walker-walk-v0": "dmc_walker_walk",
    "DMC_walker_walk": "dmc_walker_walk",
    "dmc/ball_in_cup-catch": "dmc_ball_in_cup_catch",
    "PongNoFrameskip-v4": "atari_pong",
    "ALE/MsPacman-v5": "atari_ms_pacman",
    "MsPacman": "atari_ms_pacman",
    "Atari_Pong": "atari_pong",
    "atari100k-ms-pacman": "atari100k_ms_pacman",
    "coinrun": "procgen_coinrun",
    "CrafterReward-v1": "crafter_reward",
    "MemoryMaze_9x9": "memorymaze_9x9",
    "MiniGrid-DoorKey-5x5-v0": "minigrid_DoorKey-5x5-v0",
    "popgym-CountRecallEasy-v0": "popgym_CountRecallEasy-v0",
    "cave:Env": "custom_cave:Env",
    "atary_pong": "atari",
    "dcm_walker_walk": "dmc",
}


@pytest.mark.parametrize("task, meant", MEANT.items())
def test_a_task_of_another_name_is_answered_with_ours(task, meant):
    pytest.importorskip("ale_py")
    with pytest.raises(UserError, match="unknown suite") as caught:
        split_task(task)
    assert f"did you mean '{meant}'?" in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_that_is_like_nothing_gets_the_list_of_suites():
    with pytest.raises(UserError, match="a task is suite_name, with suite one of atari, atari100k, bsuite"):
        split_task("qwxz")
    assert split_task("dmc_walker_walk") == ("dmc", "walker_walk") and set(ALIASES.values()) <= SUITES.keys()


def test_spelling_is_compared_without_case_and_punctuation():
    assert str(unknown_name("game", "MsPacman", ["pacman", "ms_pacman", "pong"])).endswith("did you mean 'ms_pacman'?")
    assert nearest("Walker-Walk", ["walker_run", "walker_walk"]) == "walker_walk" and nearest("x", ["abc"]) is None
