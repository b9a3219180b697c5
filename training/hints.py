"""What the user may have meant: keys, presets and values of other names, those of other code for the same things."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tools import UserError, nearest, plain

# Names in dreamerv3-torch, danijar's dreamer, dreamerv2 and dreamerv3, sheeprl, Stable-Baselines3 and CleanRL, as
# `tools.plain` writes them, whole or the last part, or two, of a dotted one -> what it is here, and what differs. Names
# that differ from ours by case, dashes, underscores, dots or the sections before them need no line.
FOREIGN = {
    # the run
    "env": "task",
    "envid": "task gym_<id>",
    "envname": "task",
    "environment": "task",
    "game": "task atari_<game>",
    "domain": "task dmc_<domain>_<task>",
    "suite": "task <suite>_<name>",
    "totaltimesteps": "steps",
    "totalsteps": "steps",
    "numsteps": "steps",
    "numtrainsteps": "steps",
    "numenvsteps": "steps",
    "maxsteps": "steps",
    "resume": "logdir (the same command on the same logdir goes on)",
    "resumefrom": "logdir (the same command on the same logdir goes on)",
    "restore": "from_checkpoint",
    "load": "from_checkpoint",
    "loadpath": "from_checkpoint",
    "checkpoint": "from_checkpoint",
    "checkpointpath": "from_checkpoint",
    "ckpt": "from_checkpoint",
    "ckptpath": "from_checkpoint",
    "traindir": "logdir (episodes go to logdir/train_eps)",
    "evaldir": "logdir (episodes go to logdir/eval_eps)",
    "outputdir": "logdir",
    "outdir": "logdir",
    "savedir": "logdir",
    "savepath": "logdir",
    "rundir": "logdir",
    "expname": "logdir",
    "runname": "logdir",
    "rootdir": "logdir",
    "tensorboardlog": "logdir",
    "preset": "configs",
    "exp": "configs (dreamerv2, dreamerv1; DreamerV3 is the default)",
    "algo": "configs (dreamerv2, dreamerv1; DreamerV3 is the default)",
    "debug": "configs debug",
    "verbose": "log_level debug",
    "quiet": "log_level warning",
    "cuda": "device cuda",
    "nocuda": "device cpu",
    "gpu": "device cuda:N",
    "cpu": "device cpu",
    "platform": "device",
    "accelerator": "device",
    "dtype": "precision",
    "computedtype": "precision",
    "amp": "precision bf16",
    "useamp": "precision bf16",
    "fp16": "precision bf16",
    "jit": "compile",
    "torchcompile": "compile",
    "numthreads": "threads",
    "torchthreads": "threads",
    "track": "logger wandb",
    "wandb": "logger wandb",
    "usewandb": "logger wandb",
    "savemodel": "save_every",
    "checkpointevery": "save_every",
    "ckptevery": "save_every",
    "savefreq": "save_every",
    "saveinterval": "save_every",
    "loginterval": "log_every",
    "logfreq": "log_every",
    "eval": "script eval_only",
    "evalonly": "script eval_only",
    "evaluate": "script eval_only",
    "evaleps": "eval_episode_num",
    "evalepisodes": "eval_episode_num",
    "neval": "eval_episode_num",
    "nevalepisodes": "eval_episode_num",
    "numevalepisodes": "eval_episode_num",
    "evalfreq": "eval_every",
    "evalinterval": "eval_every",
    "reportevery": "eval_every",
    "capturevideo": "video_pred_log",
    "savevideo": "video_pred_log",
    "video": "video_pred_log",
    # environments
    "numenvs": "envs",
    "nenvs": "envs",
    "numworkers": "envs (with --parallel each has a process of its own)",
    "syncenv": "parallel false",
    "frameskip": "action_repeat",
    "repeat": "action_repeat",
    "maxepisodesteps": "time_limit (environment frames)",
    "episodelength": "time_limit (environment frames)",
    "timelimit": "time_limit",
    "screensize": "size",
    "imagesize": "size",
    "imgsize": "size",
    "resolution": "size",
    "grayscale": "atari.gray",
    "stickey": "atari.sticky (a chance)",
    "stickyactions": "atari.sticky (a chance)",
    # data and clocks
    "learningstarts": "prefill (agent steps)",
    "startsteps": "prefill (agent steps)",
    "warmupsteps": "prefill (agent steps)",
    "seedsteps": "prefill (agent steps)",
    "seedepisodes": "prefill (agent steps)",
    "buffersize": "dataset_size",
    "replaysize": "dataset_size",
    "replaybuffersize": "dataset_size",
    "capacity": "dataset_size",
    "buffercapacity": "dataset_size",
    "perrankbatchsize": "batch_size",
    "minibatchsize": "batch_size",
    "perranksequencelength": "batch_length",
    "sequencelength": "batch_length",
    "seqlen": "batch_length",
    "chunksize": "batch_length",
    "replayratio": "train_ratio (replayed steps per agent step: updates * batch_size * batch_length)",
    "utdratio": "train_ratio (replayed steps per agent step: updates * batch_size * batch_length)",
    "utd": "train_ratio (replayed steps per agent step: updates * batch_size * batch_length)",
    "trainevery": "train_ratio (replayed steps per agent step: batch_size * batch_length / train_every)",
    "trainfrequency": "train_ratio (replayed steps per agent step: batch_size * batch_length / train_freq)",
    "trainfreq": "train_ratio (replayed steps per agent step: batch_size * batch_length / train_freq)",
    "gradientsteps": "train_ratio (replayed steps per agent step: updates * batch_size * batch_length)",
    "trainsteps": "train_burst",
    "nsteps": "train_ratio (updates follow each agent step: there are no rollouts of n steps)",
    "pretrainsteps": "pretrain",
    # learning
    "gamma": "horizon (1 / (1 - gamma))",
    "discount": "horizon (1 / (1 - discount))",
    "lambda": "lam",
    "lmbda": "lam",
    "algohorizon": "imag_horizon",
    "discountlambda": "lam",
    "gaelambda": "lam",
    "imaglength": "imag_horizon",
    "imaginationhorizon": "imag_horizon",
    "planninghorizon": "imag_horizon",
    "imaggradient": "actor.grad",
    "imaggradientmix": "actor.grad_mix",
    "opt": "optimizer adam",
    "lr": "opt.lr",
    "learningrate": "opt.lr",
    "modellr": "opt.lr (one for all parts; model_opt.lr with --optimizer adam)",
    "actorlr": "opt.lr (one for all parts; actor_opt.lr with --optimizer adam)",
    "valuelr": "opt.lr (one for all parts; critic_opt.lr with --optimizer adam)",
    "criticlr": "opt.lr (one for all parts; critic_opt.lr with --optimizer adam)",
    "opteps": "opt.eps",
    "adameps": "model_opt.eps",
    "gradclip": "opt.agc (of the tensor's norm; model_opt.clip with --optimizer adam)",
    "maxgradnorm": "opt.agc (of the tensor's norm; model_opt.clip with --optimizer adam)",
    "clipgradients": "opt.agc (of the tensor's norm; model_opt.clip with --optimizer adam)",
    "weightdecay": "model_opt.decay (with --optimizer adam)",
    "wd": "model_opt.decay (with --optimizer adam)",
    "entcoef": "actor.entropy",
    "entropycoef": "actor.entropy",
    "actent": "actor.entropy",
    "actorent": "actor.entropy",
    "actorentropy": "actor.entropy",
    "kl": "free_nats",
    "klfree": "free_nats",
    "klfreenats": "free_nats",
    "free": "free_nats",
    "klscale": "loss_scales.dyn",
    "klbalance": "loss_scales.dyn (and loss_scales.rep: their weights)",
    "dynscale": "loss_scales.dyn",
    "kldynamic": "loss_scales.dyn",
    "repscale": "loss_scales.rep",
    "klrepresentation": "loss_scales.rep",
    "rewardscale": "loss_scales.reward",
    "rew": "loss_scales.reward",
    "contscale": "loss_scales.cont",
    "con": "loss_scales.cont",
    "tau": "critic.slow_rate",
    "slowtargetfraction": "critic.slow_rate",
    "slowtargetupdate": "critic.slow_every",
    "targetnetworkfrequency": "critic.slow_every",
    "targetupdateinterval": "critic.slow_every",
    "slowvaluetarget": "critic.slow_reg",
    "slowreg": "critic.slow_reg",
    "rewardema": "return_norm.rate",
    "perclo": "return_norm.low",
    "perchi": "return_norm.high",
    "explamount": "expl_noise",
    "explorationnoise": "expl_noise",
    "evalnoise": "eval_mode sample",
    "evalstatemean": "eval_mode mode",
    "cliprange": "ppo.clip",
    "clipcoef": "ppo.clip",
    "vfcoef": "loss_scales.value",
    # networks
    "obskeys": "encoder.mlp_keys (vectors; encoder.cnn_keys for images)",
    "dyndeter": "rssm.deter",
    "recurrentstatesize": "rssm.deter",
    "densesize": "rssm.deter",
    "dynhidden": "rssm.hidden",
    "hiddensize": "rssm.hidden",
    "dynstoch": "rssm.stoch",
    "stochasticsize": "rssm.stoch",
    "dyndiscrete": "rssm.classes",
    "discrete": "rssm.classes",
    "discretesize": "rssm.classes",
    "dyncell": "rssm.cell",
    "dynrecdepth": "rssm.dyn_layers",
    "unimixratio": "rssm.unimix",
    "actionunimixratio": "actor.unimix",
    "rewardlayers": "reward_head.layers",
    "contlayers": "cont_head.layers",
    "valuelayers": "critic.layers",
    "actordist": "actor.dist",
    "actorminstd": "actor.min_std",
    "actormaxstd": "actor.max_std",
    "cnndepth": "encoder.depth",
    "cnnchannelsmultiplier": "encoder.depth",
    "kernelsize": "encoder.kernel",
    "symloginputs": "encoder.symlog",
    "denseunits": "encoder.units",
    "cnnkeysencoder": "encoder.cnn_keys (a regular expression)",
    "mlpkeysencoder": "encoder.mlp_keys (a regular expression)",
    "cnnkeysdecoder": "encoder.cnn_keys (what the encoder sees the decoder predicts)",
    "mlpkeysdecoder": "encoder.mlp_keys (what the encoder sees the decoder predicts)",
    "cnnkeys": "encoder.cnn_keys",
    "mlpkeys": "encoder.mlp_keys",
    "contdisc": "cont_head.discounted",
    "rewardhead": "reward_head.dist",
    "valuehead": "critic.dist",
    "modelsize": "configs size12m",
    "size1m": "configs size1m",
    "size12m": "configs size12m",
    "size25m": "configs size25m",
    "size50m": "configs size50m",
    "size100m": "configs size100m",
    "size200m": "configs size200m",
    "size400m": "configs size400m",
}
# Sections of danijar/dreamerv3 and sheeprl -> ours
SECTIONS = {
    "enc": "encoder",
    "dec": "decoder",
    "dyn": "rssm",
    "worldmodel": "rssm",
    "policy": "actor",
    "value": "critic",
    "rewhead": "reward_head",
    "conhead": "cont_head",
    "retnorm": "return_norm",
}
# Key -> {a value that it does not take: what is said of it}
VALUES = {
    "device": {"mps": "Apple's GPUs are not supported, take cpu", "gpu": "take cuda", "xpu": "not supported, take cpu"},
    "precision": {
        **dict.fromkeys(("16", "float16", "fp16", "half", "16-mixed"), "half precision is bf16 here"),
        **dict.fromkeys(("bfloat16", "bf16-mixed"), "take bf16"),
        **dict.fromkeys(("float32", "fp32", "32-true"), "take 32"),
    },
    "script": {
        **dict.fromkeys(("train_eval", "train_save", "parallel"), "train evaluates too"),
        **dict.fromkeys(("eval", "evaluate", "test"), "take eval_only"),
    },
    "actor.dist": dict.fromkeys(("onehot", "categorical"), "it is of continuous actions: leave it out"),
    "optimizer": dict.fromkeys(("adamw",), "take adam with --model_opt.decay"),
    "logger": dict.fromkeys(("jsonl", "json", "terminal", "none"), "JSON lines are always written"),
}


def unknown(what: str, name: str, known: Iterable[str], where: str, advice: str = "") -> UserError:
    """Make the UserError for a name that does not exist, with what may have been meant.

    Args:
      what: str, "key" or "preset"; name: str; known: all such names, str; where: str that begins the message; advice:
        what else could be done, str.
    """
    names = [f"{key}NAME" if key.endswith(".") else key for key in known]
    meant = (of_key if what == "key" else of_preset)(name, names)
    hint = f", did you mean {'--' * (where == '--')}{meant}?" if meant else " (--help lists all)"
    if what == "preset" and name == "defaults":
        hint = ": the defaults always lie below, leave it out"
    return UserError(f"{where}{name}: unknown {what}{hint}{advice}")


def of_preset(name: str, known: list[str]) -> str:
    """Return the preset that `name` may mean, or an empty text."""
    begun = [key for key in known if plain(key).startswith(plain(name))] if plain(name) else []
    return (begun and begun[0]) or nearest(name, known) or ""


def of_key(name: str, known: list[str]) -> str:
    """Return the key that `name` may mean, and what its value is if that differs, or an empty text."""
    whole, last = plain(name), plain(name.rpartition(".")[2])
    two = plain("".join(name.split(".")[-2:]))
    same = [key for key in known if plain(key) == whole and not key.endswith(".")]
    inside = [key for key in known if key.lower().startswith(f"{name.lower()}.")]
    negated = [f"{key} false" for key in known if f"no{plain(key)}" == whole]
    foreign = {name: meant for name, meant in FOREIGN.items() if meant.split(" ")[0] in known}
    if found := [*same, *([foreign[whole]] if whole in foreign else []), *inside, *negated]:
        return found[0]
    guesses = (
        nearest(name, known, 0.85),
        foreign.get(two),
        same_last_part(name, known) if "." in name else "",
        foreign.get(last),
        same_last_part(name, known),
        nearest(name, known, 0.7),
        foreign.get(nearest(whole, foreign, 0.9) or ""),
    )
    return next(filter(None, guesses), "")


def same_last_part(name: str, known: list[str]) -> str:
    """Return a key whose last part is that of `name`, best one in a section that `name` has, or an empty text.

    A dotted `name` that names none of the sections gets one only if there is no other.
    """
    *above, last = (part for part in name.split(".") if part)
    sections = {plain(SECTIONS.get(plain(part), part)) for part in above}
    keys = [key for key in known if plain(key.rpartition(".")[2]) == plain(last)]
    inside = [key for key in keys if sections & {plain(part) for part in key.split(".")[:-1]}]
    bare = [key for key in keys if "." not in key]
    if inside or bare or len(keys) == 1:
        return (inside or bare or keys)[0]
    return f"{keys[0]} (--help {last} lists others)" if keys and not above else ""


def of_value(name: str, value: Any) -> str:
    """Return what is to be said of a wrong value of a key, in brackets, or an empty text."""
    values = value if isinstance(value, (list, tuple)) else [value]
    said = [VALUES.get(name, {}).get(str(each).lower()) for each in values]
    return next((f" ({text})" for text in said if text), "")


def of_stray(word: str, after: str, keys: Iterable[str], presets: Iterable[str]) -> str:
    """Return what is wrong with a word that belongs to no flag.

    after: the flag before it and its value, or an empty text; keys, presets: their names.
    """
    said = f"{word}: stray argument"
    name, equals, _ = word.lstrip("-").partition("=")
    if word in set(presets):
        return f"{said}, did you mean --configs {word}?"
    if equals or (word.startswith("-") and plain(name) in map(plain, keys)):
        meant = name if name in set(keys) else of_key(name, [*keys, "configs"])
        return f"{said}, options are given as --key value" + (f": did you mean --{meant}?" if meant else "")
    if after:
        return f"{said} after {after}: a value with spaces, or with * in it, is put in quotes"
    return f"{said}, options are given as --key value"
