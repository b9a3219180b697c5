"""What a run says of itself when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specs import ActionSpec, ObsSpec


def start_lines(
    run: Any,
    specs: tuple[ObsSpec, ActionSpec],
    about: Mapping[str, str],
    left_out: Mapping[str, str],
    device: Any,
) -> list[str]:
    """Return the lines of a run that is about to start, or to go on.

    Args:
      run: Run, restored; specs: of observations and actions; about: {observation: what it is taken for}.
      left_out: {observation that the model does not see: key that says so}; device: of the networks.
    """
    config = run.config
    return aligned(
        [
            *what(config, run.agent, device),
            *([("ranks", f"{run.ranks.count}, which share batch, environments and replay")] * (run.ranks.count > 1)),
            *([("actor", f"on a clock of {config.control_hz:g} Hz, in real time")] * (config.collect == "async")),
            ("model", model(run.agent)),
            *seen_and_done(specs, about, left_out),
            ("replay", f"{memory(run.replay)}{' in each rank' if run.ranks.count > 1 else ''}"),
            ("planned", planned(run)),
            ("logdir", f"{run.logdir}: {standing(run)}"),
        ]
    )


def evaluation_lines(
    config: Any,
    agent: Any,
    specs: tuple[ObsSpec, ActionSpec],
    about: Mapping[str, str],
    left_out: Mapping[str, str],
    device: Any,
    checkpoint: tuple[Any, int],
) -> list[str]:
    """Return the lines of an evaluation that is about to start.

    Args:
      agent: restored; specs, about, left_out, device: as for `start_lines`; checkpoint: its path, and the frames that
        the agent had seen.
    """
    path, step = checkpoint
    count = min(config.eval_envs, config.eval_episode_num)
    return aligned(
        [
            *what(config, agent, device),
            ("model", model(agent)),
            *seen_and_done(specs, about, left_out),
            ("checkpoint", f"{path}: step {step:,}"),
            ("planned", f"{counted(config.eval_episode_num, 'episode')} in {counted(count, 'environment')}"),
            ("logdir", str(config.logdir)),
        ]
    )


def aligned(rows: list[tuple[str, str]]) -> list[str]:
    """Return lines of a name and a text."""
    wide = max(len(name) for name, _ in rows)
    return [f"{name:{wide}}  {text}" for name, text in rows]


def what(config: Any, agent: Any, device: Any) -> list[tuple[str, str]]:
    """Return the rows that say what is run, and where."""
    return [
        ("task", f"{config.task}, {config.version}, seed {config.seed}"),
        ("runs on", machine(config, agent, device)),
    ]


def seen_and_done(
    specs: tuple[ObsSpec, ActionSpec], about: Mapping[str, str], left_out: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the rows of observations and actions."""
    obs_spec, act_spec = specs
    return [
        *((f"{kind}s", keys) for kind, keys in observed(obs_spec, about).items()),
        *((("left out", absent(left_out)),) if left_out else ()),
        ("actions", actions(act_spec)),
    ]


def counted(count: int, noun: str) -> str:
    """Return a number of things: 1 update, 2 updates."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def machine(config: Any, agent: Any, device: Any) -> str:
    """Say where networks compute, in which type, and in what form."""
    dtype = str(getattr(agent, "dtype", "")).removeprefix("torch.")
    compiled = "compiled" if config.compile else "not compiled"
    form = [dtype, compiled, *(["CUDA graphs"] if config.graphs != "false" and device.type == "cuda" else [])]
    return ", ".join([str(device), *(form if dtype else [])])


def model(agent: Any) -> str:
    """Say how many parameters are learned."""
    nets = getattr(agent, "nets", None)
    count = sum(param.numel() for param in nets.parameters() if param.requires_grad) if nets else 0
    return f"{count:,} parameters" if count else "nothing is learned"


def observed(obs_spec: ObsSpec, about: Mapping[str, str]) -> dict[str, str]:
    """Return {kind: its keys, each with what it is taken for}."""
    words: dict[str, list[str]] = {}
    for key, seen in obs_spec.items():
        words.setdefault(seen.kind, []).append(f"{key} {about[key].removeprefix(seen.kind).strip()}")
    return {kind: ", ".join(keys) for kind, keys in words.items()}


def absent(left_out: Mapping[str, str]) -> str:
    """Say which observations the model does not see, and which key says so."""
    keys = dict.fromkeys(left_out.values())
    return "; ".join(f"{', '.join(name for name in left_out if left_out[name] == key)} by {key}" for key in keys)


def actions(act_spec: ActionSpec) -> str:
    """Say what is done: numbers, and choices of so many."""
    words = []
    for key, width in act_spec.widths.items():
        classes = act_spec.classes.get(key)
        choices = classes and (f"one of {classes[0]}" if len(classes) == 1 else f"{len(classes)} choices")
        words.append(f"{key} {choices or f'{width} in [-1, 1]'}")
    return ", ".join(words)


def memory(replay: Any) -> str:
    """Say what the replay takes once it is full."""
    return f"{replay.memory}{', and as much on the GPU' if replay.mirror else ''}"


def planned(run: Any) -> str:
    """Say what is to be done until the end."""
    ahead, config = run.out.progress.ahead(), run.config
    prefill = 0 if run.offline else max(0, config.prefill - run.agent_steps)
    start = f"{counted(prefill, 'agent step')} of prefill, " if prefill else ""
    updates = "as many updates as there is time for" if config.collect == "async" else counted(ahead.updates, "update")
    return f"{start}{updates} until frame {config.steps:,}"


def standing(run: Any) -> str:
    """Say whether a run is fresh, or from where it goes on."""
    if not run.resumed:
        return "fresh"
    if not run.going():
        return f"all frames are seen at step {run.step:,}, the last evaluation is to come"
    return f"resuming at step {run.step:,}"
