"""Checkpoints of Dreamer as older versions of this project wrote them."""

import re

import torch

from modalities import MODALITIES
from specs import ActionSpec, ObsSpec
from tools import UserError, misfit

TENSORS = {str: torch.Tensor}
MOMENTS = {str: lambda kept: misfit(kept, TENSORS) is None and kept.keys() in ({"nu", "mu"}, ADAM)}
ADAM = {"step", "exp_avg", "exp_avg_sq"}
SIZES = {str: [int]}
OBSERVED = {str: {"kind": lambda kind: kind in MODALITIES, "shape": [int], "classes": [int]}}
OBSERVED_ONCE = {"images": SIZES, "vectors": SIZES, "classes": SIZES}
SPECS = {
    "observation": lambda specs: not (misfit(specs, OBSERVED) and misfit(specs, OBSERVED_ONCE)),
    "action": {"widths": {str: int}, "classes": SIZES},
}
SAVED = {"model": TENSORS, "opt": {str: object}, "signature": {str: str}, "specs?": SPECS}  # see `tools.misfit`
OPTIMIZERS = {  # by the key that only they have, of the newest form first
    "moments": {"kind": str, "names": [str], "moments": MOMENTS},
    "adams": {"adams": {str: {int: TENSORS}}, "names": {str: [str]}},
    "nu": {"names": [str], "count": torch.Tensor, "nu": torch.Tensor, "mu": torch.Tensor},
}

# Patterns of parameters that were renamed, and their names now; None for what is no longer there.
RENAMED = {
    r"explorer\.behavior\.(.*)": r"expl_behavior.\1",
    r"(behavior|expl_behavior)\.return_norm\.weight": None,
}
# Buffers that a state may have or lack: of an own Adam whose rate learns, and of a hierarchy's usual state.
OPTIONAL = r"_opt\.(factor|last)$|\.goals\.(usual|count)$"


def rename(name):
    """Return what a parameter is called now, or None if it is gone."""
    for pattern, now in RENAMED.items():
        if name is not None and (match := re.fullmatch(pattern, name)):
            name = now and match.expand(now)
    return name


def check_form(saved):
    """Raise UserError unless a state has the form of what `Dreamer.state_dict` returns, or returned once."""
    reason = misfit(saved, SAVED, "agent")
    form = next((form for key, form in OPTIMIZERS.items() if key in saved["opt"]), None) if not reason else None
    reason = reason or (misfit(saved["opt"], form, "agent.opt") if form else "agent.opt.moments is missing")
    if not reason and form is OPTIMIZERS["nu"]:
        sizes = [saved["model"][name].numel() if name in saved["model"] else -1 for name in saved["opt"]["names"]]
        fits = min(sizes, default=0) >= 0 and {saved["opt"][key].numel() for key in ("nu", "mu")} == {sum(sizes)}
        reason = None if fits else "agent.opt.names are of other parameters"
    if reason:
        raise UserError(f"the checkpoint is damaged or of another project: {reason}")


def read_specs(saved):
    """Return the ObsSpec and the ActionSpec that a state of any agent tells. Raises UserError if it does not."""
    reason = misfit(saved, {"specs": SPECS}, "agent")
    if reason:
        raise UserError(f"the checkpoint is of an older version, damaged or of another project: {reason}")
    actions = {key: saved["specs"]["action"][key] for key in ActionSpec._fields}
    return ObsSpec.read(saved["specs"]["observation"]), ActionSpec(**actions)


def modernize(saved, nets):
    """Return a saved state in today's names and forms. Raises UserError if it has none of theirs.

    A bias that it lacks starts at the zeros that it implied, and what is `OPTIONAL`, such as the factor of a rate that
    learns on one side alone, where it starts here. The optimizer's state is matched by name.

    Args:
      saved: what `Dreamer.state_dict` returned then; nets: module that it is for.
    """
    check_form(saved)
    model = renamed(saved["model"])
    implied = {n: torch.zeros_like(p) for n, p in nets.named_parameters() if n not in model and n.endswith(".bias")}
    own = {name: tuple(value.shape) for name, value in nets.state_dict().items()}
    implied |= {n: value for n, value in nets.state_dict().items() if n not in model and re.search(OPTIONAL, n)}
    model = {name: value for name, value in model.items() if name in own or not re.search(OPTIONAL, name)}
    told = {name: text for name, text in renamed(saved["signature"]).items() if name in model or name not in own}
    told = {name: text for name, text in told.items() if name in own or not re.search(OPTIONAL, name)}
    signature = told | {name: str(tuple(value.shape)) for name, value in (model | implied).items()}
    specs = dict(saved.get("specs", {}))
    if specs:
        specs["observation"] = ObsSpec.read(specs["observation"]).plain()
    return {
        "model": model | implied,
        "opt": modern_optimizer(saved["opt"], saved["model"]),
        "signature": signature,
        "specs": specs,
        **{name: saved[name] for name in ("meta",) if name in saved},
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
