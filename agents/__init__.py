"""Agents by the name that the key `agent` gives them; training/protocol.py says what the loop expects of one."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from specs import ActionSpec, ObsSpec
from training.machine import choose_device, choose_dtype
from training.protocol import Agent

# name -> module with make(obs_spec, act_spec, config, device, dtype). Nothing is imported before it is asked for.
AGENTS = {"dreamer": "agents.dreamer", "random": "agents.random", "world_models": "agents.world_models"}


def make_agent(config: Any, obs_spec: ObsSpec, act_spec: ActionSpec) -> Agent:
    """Return the `training.protocol.Agent` that a configuration names, compiled if it says so.

    Raises UserError for sizes that no network can have, a missing device or compiler.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed % 2**64)  # for initial parameters, whatever the environments have drawn
    make = importlib.import_module(AGENTS[config.agent]).make
    return make(obs_spec, act_spec, config, device, choose_dtype(config.precision, device))
