"""An environment's own spaces as plain data, and its wrappers put around data alone.

A run saves the description with its checkpoint, so that a trained agent can be given what the environment gives, and
answer in what the environment takes, where there is no environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.checks import ALPHANUMERIC
from envs.wrappers import PlainActions, PlainObs, flags
from specs import tagged

TAGS = "modality", "optional"  # what `specs.tagged` puts on a space


def describe(space: spaces.Space) -> dict[str, Any]:
    """Return a space as numbers, strings and lists; bounds that are the same everywhere are one number."""
    plain = {"kind": type(space).__name__, "shape": list(space.shape or ()), "dtype": np.dtype(space.dtype).name}
    plain |= {name: vars(space)[name] for name in TAGS if vars(space).get(name)}
    if isinstance(space, spaces.Text):
        plain |= {"letters": "".join(sorted(space.character_set))} if space.character_set != ALPHANUMERIC else {}
        return {**plain, "kind": "Text", "length": [space.min_length, space.max_length]}
    if isinstance(space, spaces.Box):
        return {**plain, "kind": "Box", "low": _bound(space.low), "high": _bound(space.high)}
    if isinstance(space, spaces.Discrete):
        return {**plain, "kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {**plain, "kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    return plain


def rebuild(plain: Mapping[str, Any]) -> spaces.Space:
    """Undo `describe`. Raises ValueError for a kind that environments here do not have."""
    return tagged(_rebuild(plain), **{name: plain[name] for name in TAGS if name in plain})


def _rebuild(plain):
    if plain["kind"] == "Text":
        low, high = plain["length"]
        return spaces.Text(high, min_length=low, charset=plain.get("letters", ALPHANUMERIC))
    shape, dtype = tuple(plain["shape"]), np.dtype(plain["dtype"])
    if plain["kind"] == "Box":
        low, high = (np.broadcast_to(np.asarray(plain[name], dtype), shape) for name in ("low", "high"))
        return spaces.Box(low, high, shape, dtype)  # type: ignore[arg-type]
    if plain["kind"] == "Discrete":
        return spaces.Discrete(plain["n"], start=plain["start"])
    if plain["kind"] == "MultiDiscrete":
        return spaces.MultiDiscrete(np.array(plain["nvec"]), dtype, start=np.array(plain["start"]))  # type: ignore
    if plain["kind"] == "MultiBinary":
        return spaces.MultiBinary(shape)
    raise ValueError(f"no space is called {plain['kind']}")


def _bound(values):
    flat = values.reshape(-1)
    return flat[0].item() if flat.size and (flat == flat[0]).all() else values.tolist()


class Echo:
    """An environment without a world: a step returns what it is given. Wrappers around it convert data.

    Args:
      obs_space, act_space: {key: space}, of which a wrapper reads its own.
    """

    def __init__(self, obs_space: Mapping[str, spaces.Space] = {}, act_space: Mapping[str, spaces.Space] = {}):
        self.obs_space, self.act_space = dict(obs_space), dict(act_space)

    def reset(self) -> Any:
        """There is nothing to begin."""

    def render(self, size: Any = None) -> Any:
        """There is nothing to see."""

    def close(self) -> None:
        """There is nothing to free."""

    def step(self, given: Any) -> Any:
        return given


class Converter:
    """Carries observations from an environment's own form to the agent's, and actions back, by `make_env`'s wrappers.

    Args:
      own: {"observation": {key: described space}, "action": likewise}, as a checkpoint has it.
      config: the whole configuration; of stacked frames, each is converted alone.
    Attributes:
      obs_space, act_space: {key: the environment's own space}.
      plain_space: {key: space of the observation as the agent sees it, a single frame of it}.
    """

    def __init__(self, own: Mapping[str, Mapping[str, Any]], config: Any):
        self.obs_space, self.act_space = (
            {key: rebuild(plain) for key, plain in own[name].items()} for name in ("observation", "action")
        )
        alone = config.replace(frame_stack=1)
        self._obs = {key: PlainObs(Echo({key: space}), alone) for key, space in self.obs_space.items()}
        self._actions = PlainActions(Echo(act_space=self.act_space))
        self.plain_space = {key: wrapper.obs_space[key] for key, wrapper in self._obs.items()}

    def plain(self, obs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Convert observations {key: value} of one environment. Raises UserError where a wrapper refuses them."""
        steps = {key: self._obs[key].step({key: value, **flags(is_first=True)}) for key, value in obs.items()}
        return {name: step[name] for key, step in steps.items() for name in self._obs[key].obs_space}

    def native(self, actions: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Convert the action {key: (width,) float32} of one environment: an int of a Discrete, else an array."""
        return self._actions.step(actions)
