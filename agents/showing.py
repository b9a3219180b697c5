"""What the behavior of a Dreamer is after, drawn for films."""

import torch

import modalities
from ops.compiling import eagerly
from rssm import State


@eagerly
@torch.no_grad()
def pictures(agent, carry):
    """Draw the goal of the task's behavior in the first environment as it would be observed, by the prior's mode.

    Args:
      agent: Dreamer; carry: its Carry.
    Returns: [uint8 (H, W, 3)], one for each observation that can be drawn; [] of a behavior without goals.
    """
    if not hasattr(agent.behavior, "goal"):
        return []
    deter = agent.behavior.goal(carry.task)[None, :1].to(agent.dtype)  # (1, 1, D)
    stoch = agent.world.rssm.predict(deter).mode().to(agent.dtype)
    draw = {key: getattr(modalities.nets(seen.kind), "picture", None) for key, seen in agent.obs_spec.items()}
    decoded = agent.world.decoder(State(deter, stoch)).items()
    return [draw[key](dist.mode()[0, 0].float().cpu().numpy()) for key, dist in decoded if draw[key]]
