"""The agent: acts in environments, learns from batches, saves and loads."""

import gymnasium
import numpy as np
import torch
import torch.nn as nn

from distributions import one_hot
from encoders import ObsSpec
from models import ImagBehavior, WorldModel
from networks import ActionSpec, State, feature
from optim import LaProp
from tools import UserError


def obs_spec(space):
    """{key: Gymnasium space} -> ObsSpec: uint8 boxes of three dimensions are images, all else vectors."""
    images, vectors, classes = {}, {}, {}
    for key, box in space.items():
        if isinstance(box, gymnasium.spaces.Discrete):
            vectors[key], classes[key] = (1,), [int(box.n)]
        elif isinstance(box, gymnasium.spaces.MultiDiscrete):
            vectors[key], classes[key] = (len(box.nvec),), [int(n) for n in box.nvec]
        elif box.dtype == np.uint8 and len(box.shape) == 3:
            images[key] = box.shape
        else:
            vectors[key] = (int(np.prod(box.shape)),)
    return ObsSpec(images, vectors, classes)


def act_spec(space):
    """{key: Gymnasium space} -> ActionSpec: one-hots of discrete keys and values of boxes, in sorted order of keys."""
    widths, classes = {}, {}
    for key, box in sorted(space.items()):
        if isinstance(box, gymnasium.spaces.Discrete):
            classes[key] = [int(box.n)]
        elif isinstance(box, gymnasium.spaces.MultiDiscrete):
            classes[key] = [int(n) for n in box.nvec]
        widths[key] = sum(classes[key]) if key in classes else int(np.prod(box.shape))
    return ActionSpec(widths, classes)


class Dreamer(nn.Module):
    """World model, behaviour and their one optimizer.

    Args:
      obs_space, act_space: {key: Gymnasium space} of the environments, or the ObsSpec and ActionSpec of a checkpoint.
      config: the whole configuration.
      device: torch device; dtype: compute dtype.
    """

    def __init__(self, obs_space, act_space, config, device="cpu", dtype=torch.float32):
        super().__init__()
        self.device, self.dtype = torch.device(device), dtype
        self.obs_spec = obs_space if isinstance(obs_space, ObsSpec) else obs_spec(obs_space)
        self.act_spec = act_space if isinstance(act_space, ActionSpec) else act_spec(act_space)
        check_sizes(self.obs_spec, config)
        self.world = WorldModel(self.obs_spec, self.act_spec, config, dtype)
        self.behavior = ImagBehavior(self.world.feat_size, self.act_spec, config)
        self.to(self.device)
        trained = ((name, param) for name, param in self.named_parameters() if param.requires_grad)
        self.opt = LaProp(trained, **config.opt.to_dict())
        self.scales = config.loss_scales.to_dict()
        self.latent_size = config.rssm.deter, (config.rssm.stoch, config.rssm.classes)

    def compile(self):
        """Compile what an update spends its time in: one step of each scan, and the behaviour's loss.

        The scans themselves stay Python loops, whose compilation would take minutes. Acting stays as it is written.
        """
        rssm, behavior = self.world.rssm, self.behavior
        rssm.observe_step = torch.compile(rssm.observe_step, dynamic=False)
        rssm.imagine_step = torch.compile(rssm.imagine_step, dynamic=False)
        behavior.policy = torch.compile(behavior.policy, dynamic=False)
        behavior.loss = torch.compile(behavior.loss, dynamic=False)

    # -- learning

    def loss(self, batch, state, noise=None, imagine=None):
        """The one loss of world model, actor and critic.

        Args:
          batch: {key: (B, T, ...)} tensors on the agent's device; state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, or None.
          imagine: function (world, start State (N, ...)) -> imagined states and actions; the policy's own if None.
        Returns: {name: unreduced loss}, the posterior State (B, T, ...), {name: tensor} for metrics.
        """
        lead = batch["reward"].shape
        batch = {**batch, "action": self.join_actions(batch)}
        losses, states, metrics = self.world.loss(batch, state, noise)
        assert all(loss.shape == lead for loss in losses.values()), (lead, {k: v.shape for k, v in losses.items()})
        start = states.map(lambda x: x.detach().flatten(0, 1))
        with torch.no_grad():
            imagined, actions = (imagine or self.behavior.imagine)(self.world, start)
        behavior, outs = self.behavior.loss(self.world, imagined, actions, lambda feat: self.world.reward(feat).mode())
        losses.update({name: loss.mean(0).view(lead) for name, loss in behavior.items()})
        losses["repval"], _ = self.behavior.replay_loss(states, batch, outs["ret"][0].view(lead))
        return losses, states, {**metrics, **outs}

    def reduce(self, losses):
        """{name: loss} -> their weighted sum of means, 0-d."""
        return sum(self.scales.get(name, self.scales["rec"]) * loss.mean() for name, loss in losses.items())

    def update(self, batch, state):
        """One gradient step on a batch (see `loss`).

        Returns: the posterior State (B, T, ...) without gradient, {name: 0-d metric}.
        """
        self.opt.zero_grad()
        losses, states, outs = self.loss(batch, state)
        total = self.reduce(losses)
        total.backward()
        metrics = self.opt.step()
        self.behavior.update_slow()
        metrics.update({f"{name}_loss": loss.detach().mean() for name, loss in losses.items()})
        metrics.update(summarize(outs), loss=total.detach())
        observed = [*self.obs_spec.images, *self.obs_spec.vectors, "reward", "cont", "dyn", "rep"]
        metrics["model_loss"] = sum(
            self.scales.get(name, self.scales["rec"]) * metrics[f"{name}_loss"] for name in observed
        )
        return states.map(torch.Tensor.detach), metrics

    def batch(self, arrays):
        """A batch of the replay as tensors on the device, and the state that its context step lends.

        Args:
          arrays: {key: (B, T + 1, ...)} with latents `deter` and `stoch`.
        Returns: {key: (B, T, ...)}, State (B, ...).
        """
        tensors = {key: torch.from_numpy(value).to(self.device, non_blocking=True) for key, value in arrays.items()}
        deter, stoch = tensors.pop("deter")[:, 0], tensors.pop("stoch")[:, 0]
        stoch = one_hot(stoch, self.latent_size[1][1])
        known = deter.any(-1)[:, None, None]  # a step that no agent has seen has no latent: the initial state then
        state = State(deter.to(self.dtype), (stoch * known).to(self.dtype))
        return {key: value[:, 1:] for key, value in tensors.items()}, state

    def compress(self, states):
        """State (..., D), (..., S, K) -> arrays: deter float16 (..., D), stoch class indices (..., S)."""
        return states.deter.half().cpu().numpy(), states.stoch.argmax(-1).cpu().numpy()

    @torch.compiler.set_stance("force_eager")
    def open_loop(self, batch, state):
        """{image key: (T, H, W, C) uint8}: sequences side by side, rows truth, model, error; half of T is seen."""
        batch = {**batch, "action": self.join_actions(batch)}
        videos = {}
        for key, model in self.world.open_loop(batch, state, batch["reward"].shape[1] // 2).items():
            truth = batch[key].float() / 255
            error = (model - truth + 1) / 2
            rows = torch.cat([truth, model, error], 2)  # (B, T, 3 H, W, C)
            video = (rows.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0, 3, 4).flatten(2, 3)
            videos[key] = video.cpu().numpy()
        return videos

    def join_actions(self, batch):
        """{key: (..., width)} -> the action vector (..., A)"""
        return torch.cat([batch[key] for key in self.act_spec.widths], -1)

    # -- acting

    def initial(self, batch):
        """What `act` remembers before the first step: a State and the last action, zeros."""
        state = self.world.rssm.initial(batch, self.device, self.dtype)
        return state, torch.zeros(batch, self.act_spec.size, device=self.device)

    @torch.compiler.set_stance("force_eager")
    @torch.no_grad()
    def act(self, obs, memory=None, mode="sample"):
        """Choose actions for a batch of environments, or for a single one.

        Args:
          obs: {key: (N, ...)} arrays, or {key: (...)} of a single environment. `is_first` (N,) or () says where an
            episode starts; left out, one starts everywhere if `memory` is None, and nowhere else.
          memory: what the last call returned, or None.
          mode: "sample" or "mode" of the policy.
        Returns: {key: (N, width) or (width,)} float32 arrays, the new memory.
        """
        if self.is_single(obs):
            actions, memory = self.act({key: np.asarray(value)[None] for key, value in obs.items()}, memory, mode)
            return {key: value[0] for key, value in actions.items()}, memory
        if "is_first" not in obs:
            obs = {**obs, "is_first": np.full(len(obs[self.world.keys[0]]), memory is None)}
        state, action = memory or self.initial(len(obs["is_first"]))
        batch = {key: torch.as_tensor(obs[key], device=self.device)[:, None] for key in [*self.world.keys, "is_first"]}
        states, _ = self.world.rssm.observe(self.world.encode(batch), action[:, None], batch["is_first"], state)
        state = states.map(lambda x: x[:, 0])
        policy = self.behavior.actor(feature(state))
        if mode == "mode":
            action = policy.mode()
        else:
            action = policy.sample(self.behavior.actor.noise(state.deter.shape[:1], self.device))
        parts = action.cpu().split(list(self.act_spec.widths.values()), -1)
        return {key: part.numpy() for key, part in zip(self.act_spec.widths, parts, strict=True)}, (state, action)

    def is_single(self, obs):
        """Whether an observation has no batch axis."""
        if "is_first" in obs:
            return np.ndim(obs["is_first"]) == 0
        key = self.world.keys[0]
        axes = np.ndim(obs[key])
        if len(self.obs_spec.classes.get(key, ())) == 1:  # a class (), of which a batch is (N,) or (N, 1)
            return axes == 0
        return axes == len(self.obs_spec.images.get(key) or self.obs_spec.vectors[key])

    def latents(self, memory):
        """What the replay stores of the state in `memory`: a list of (deter, stoch) for each environment."""
        return list(zip(*self.compress(memory[0]), strict=True))

    # -- saving

    def save(self):
        """All that learning depends on: parameters, slow critic, normaliser, optimizer."""
        return {
            "model": self.state_dict(),
            "opt": self.opt.state_dict(),
            "signature": self.signature(),
            "specs": self.specs(),
        }

    def load(self, saved):
        """Undo `save`. Raises UserError that names both shapes if the checkpoint is of another agent."""
        for name, (theirs, ours) in differences(saved["signature"], self.signature()).items():
            raise UserError(f"the checkpoint is of another agent: {name} is {theirs} there and {ours} here")
        for kind, spec in self.specs().items():  # equal sizes may be of other classes; old checkpoints do not tell
            for name, (theirs, ours) in differences(saved.get("specs", {}).get(kind, spec), spec).items():
                raise UserError(f"the checkpoint is of another agent: {kind} {name}: {theirs} there and {ours} here")
        self.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])

    def specs(self):
        """What the agent sees and does in plain types, enough to build it anew without an environment."""
        return {"observation": self.obs_spec._asdict(), "action": self.act_spec._asdict()}

    def signature(self):
        """Names and shapes of observations, actions and parameters, as text."""
        spaces = {
            f"{kind} {key}": str(tuple(size) if isinstance(size, (list, tuple)) else size)
            for kind, sizes in {
                "image": self.obs_spec.images,
                "vector": self.obs_spec.vectors,
                "action": self.act_spec.widths,
            }.items()
            for key, size in sizes.items()
        }
        return spaces | {name: str(tuple(value.shape)) for name, value in self.state_dict().items()}


def differences(theirs, ours):
    """{name: (theirs, ours)} of what differs between two mappings, 'absent' for what one of them lacks."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = {name: (theirs.get(name, "absent"), ours.get(name, "absent")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@torch.no_grad()
def summarize(outs):
    """Metrics of an update: means of the imagined and observed quantities, 0-d tensors."""
    ret = (outs["ret"] - outs["ret_offset"]) / outs["ret_scale"]
    return {
        "kl": outs["kl"].mean(),
        "post_ent": outs["post_ent"].mean(),
        "prior_ent": outs["prior_ent"].mean(),
        "actor_entropy": outs["entropy"].mean(),
        "adv": outs["adv"].mean(),
        "adv_std": outs["adv"].std(correction=0),
        "adv_mag": outs["adv"].abs().mean(),
        "imag_reward": outs["reward"].mean(),
        "imag_cont": outs["cont"].mean(),
        "imag_return": outs["ret"].mean(),
        "imag_return_norm": ret.mean(),
        "imag_return_min": ret.min(),
        "imag_return_max": ret.max(),
        "imag_return_rate": (ret.abs() >= 1).float().mean(),
        "imag_value": outs["value"].mean(),
        "imag_slow_value": outs["slow"].mean(),
        "imag_weight": outs["weight"].mean(),
        "return_scale": outs["ret_scale"],
    }


RESERVED = {"policy", "value", "repval", "cont", "dyn", "rep", "deter", "stoch"}


def check_sizes(spec, config):
    """Raises UserError for names and sizes that no network can have."""
    for key in RESERVED & {*spec.images, *spec.vectors}:
        raise UserError(f"the environment calls an observation {key}, which is the name of a loss or a latent here")
    factor = 2 ** len(config.encoder.mults)
    for key, shape in spec.images.items():
        if shape[0] % factor or shape[1] % factor:
            raise UserError(f"image {key} is {shape[0]}x{shape[1]}: --size must be a multiple of {factor}")
    if config.rssm.deter % config.rssm.blocks:
        raise UserError(f"--rssm.deter {config.rssm.deter} is no multiple of --rssm.blocks {config.rssm.blocks}")
    channels = config.decoder.depth * config.decoder.mults[-1]
    for name, width in {"rssm.deter": config.rssm.deter, "decoder.depth x decoder.mults[-1]": channels}.items():
        if spec.images and width % config.decoder.blocks:
            raise UserError(f"{name} = {width} is no multiple of --decoder.blocks {config.decoder.blocks}")
