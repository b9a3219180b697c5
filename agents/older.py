"""Checkpoints of Dreamer as older versions of this project wrote them."""

import re

import torch

from specs import ObsSpec

# Patterns of parameters that were renamed, and their names now; None for what is no longer there.
RENAMED = {
    r"explorer\.behavior\.(.*)": r"expl_behavior.\1",
    r"(behavior|expl_behavior)\.return_norm\.weight": None,
}


def rename(name):
    """Return what a parameter is called now, or None if it is gone."""
    for pattern, now in RENAMED.items():
        if name is not None and (match := re.fullmatch(pattern, name)):
            name = now and match.expand(now)
    return name


def modernize(saved, nets):
    """Return a saved state in today's names and forms.

    A bias that it lacks starts at the zeros that it implied. The optimizer's state is matched by name.

    Args:
      saved: what `Dreamer.state_dict` returned then; nets: module that it is for.
    """
    model = renamed(saved["model"])
    implied = {n: torch.zeros_like(p) for n, p in nets.named_parameters() if n not in model and n.endswith(".bias")}
    own = {name: tuple(value.shape) for name, value in nets.state_dict().items()}
    signature = renamed(saved["signature"]) | {name: str(own[name]) for name in implied}
    specs = dict(saved.get("specs", {}))
    if specs:
        specs["observation"] = ObsSpec.read(specs["observation"]).plain()
    return {
        "model": model | implied,
        "opt": modern_optimizer(saved["opt"], saved["model"]),
        "signature": signature,
        "specs": specs,
    }


def renamed(tree):
    """Return {name: value} under today's names, without what is gone."""
    pairs = ((rename(name), value) for name, value in tree.items())
    return {name: value for name, value in pairs if name is not None}


def modern_optimizer(state, model):
    """Return an optimizer's state by parameter, {name: {moment: tensor}}, under today's names.

    Adam's moments were numbered within a group, LaProp's were flat buffers in the order of `names`.
    """
    if "adams" in state:
        names = [name for group in state["names"].values() for name in group]
        kept = [state["adams"][group].get(i) for group, own in state["names"].items() for i in range(len(own))]
        state = {"kind": "adam", "moments": {n: found for n, found in zip(names, kept, strict=True) if found}}
    elif "moments" not in state:
        names, shapes = state["names"], [model[name].shape for name in state["names"]]
        parts = [state[moment].split([shape.numel() for shape in shapes]) for moment in ("nu", "mu")]
        moments = {n: {"nu": nu.view(s), "mu": mu.view(s)} for n, s, nu, mu in zip(names, shapes, *parts, strict=True)}
        state = {"kind": "laprop", "count": state["count"], "moments": moments}
    else:
        names = state["names"]
    return {**state, "names": list(renamed(dict.fromkeys(names))), "moments": renamed(state["moments"])}
