"""The agent: acts in environments, learns from batches, saves and loads."""

import functools

import numpy as np
import torch
import torch.nn as nn

from behaviors.cem import CEM
from exploration import Plan2Explore, perturb
from models import ImagBehavior, WorldModel, behavior_metrics, frozen
from networks import State, feature
from ops.distributions import one_hot
from ops.graphs import Captured
from ops.optim import Adams, LaProp
from specs import ActionSpec, ObsSpec, act_spec, obs_spec
from tools import UserError

MODES = ("mode", "sample", "noisy", "explore")  # of acting


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
        self.behavior = self.make_behavior(config)
        self.explorer = self.make_explorer(config) if config.expl_behavior == "plan2explore" else None
        self.expl_noise = config.expl_noise
        self.to(self.device)
        trained = [(name, param) for name, param in self.named_parameters() if param.requires_grad]
        self.opt = LaProp(trained, **config.opt.to_dict()) if config.optimizer == "laprop" else Adams(trained, config)
        self.scales = config.loss_scales.to_dict()
        sizes = config.rssm.deter, (config.rssm.stoch, config.rssm.classes)
        self.latent_size = sizes if config.replay_context else None

    def make_behavior(self, config):
        if config.behavior == "cem":
            return CEM(self.act_spec, config.cem)
        return ImagBehavior(self.world.feat_size, self.act_spec, config, replayed=config.loss_scales.repval > 0)

    def make_explorer(self, config):
        behavior = ImagBehavior(self.world.feat_size, self.act_spec, config, replayed=False)
        rssm = self.world.rssm
        sizes = {"stoch": rssm.latent.size, "deter": rssm.deter, "feat": self.world.feat_size}
        sizes["embed"] = self.world.encoder.size
        return Plan2Explore(sizes, self.world.feat_size, self.act_spec.size, config, behavior)

    def behaviors(self):
        """The task's behaviour, and the explorer's if there is one."""
        return [self.behavior, self.explorer.behavior] if self.explorer else [self.behavior]

    def compile(self):
        """Compile what an update spends its time in: one step of each scan, and the behaviour's loss.

        The scans themselves stay Python loops, whose compilation would take minutes. Acting stays as it is written.
        On CUDA the kernels of a whole update, and those of acting, then become one graph each.
        """
        rssm = self.world.rssm
        rssm.call_step = torch.compile(rssm.call_step, dynamic=False)
        rssm.imagine_step = torch.compile(rssm.imagine_step, dynamic=False)
        for behavior in self.behaviors():
            behavior.compile()
        if self.device.type == "cuda":
            self.update = Captured(self.update)
            self.chooser = functools.cache(lambda *args: Captured(Dreamer.chooser(self, *args)))

    # -- learning

    def loss(self, batch, state, noise=None, imagine=None):
        """The one loss of world model, actor and critic, and of the explorer if there is one.

        Args:
          batch: {key: (B, T, ...)} tensors on the agent's device; state: State (B, ...) before the first step.
          noise: (B, T, S) for the posterior draws, or None.
          imagine: function (world, start State (N, ...)) -> imagined states and actions; the policy's own if None.
        Returns: {name: unreduced loss}, the posterior State (B, T, ...), {name: tensor} of what came up on the way.
        """
        lead = batch["reward"].shape
        batch = self.world.preprocess({**batch, "action": self.join_actions(batch)})
        losses, states, outs = self.world.loss(batch, state, noise)
        assert all(loss.shape == lead for loss in losses.values()), (lead, {k: v.shape for k, v in losses.items()})
        behavior, imagined = self.behavior.losses(self.world, states, batch, self.task_reward, imagine)
        losses, outs = losses | behavior, outs | imagined
        if self.explorer:
            explorer, outs["explorer"] = self.explorer_losses(states, batch, outs["embed"])
            losses |= explorer
        return losses, states, outs

    def task_reward(self, feat, actions):
        """The reward head's prediction for features (H + 1, N, F): (H + 1, N)."""
        return self.world.reward(feat).mode()

    def explorer_losses(self, states, batch, embed):
        """Losses of the explorer, its behaviour's by names that begin with expl_, and what it imagined."""
        feat = feature(states)
        targets = {"stoch": states.stoch.flatten(2), "deter": states.deter, "feat": feat, "embed": embed}
        target = targets[self.explorer.target]
        disag = self.explorer.ensemble_loss(feat, batch["action"], target, batch["is_first"])
        reward = self.explorer.reward(self.task_reward)
        with frozen(self.explorer.ensemble):
            losses, outs = self.explorer.behavior.losses(self.world, states, batch, reward)
        return {"disag": disag, **{f"expl_{name}": loss for name, loss in losses.items()}}, outs

    def reduce(self, losses):
        """{name: loss} -> their weighted sum of means, 0-d."""
        return sum(self.scale(name) * loss.mean() for name, loss in losses.items())

    def scale(self, name):
        """The weight of a loss; the explorer's policy and value weigh as much as the task's."""
        return self.scales.get(name.removeprefix("expl_"), self.scales["rec"])

    def update(self, batch, state):
        """One gradient step on a batch (see `loss`).

        Returns: the posterior State (B, T, ...) without gradient, {name: 0-d metric}.
        """
        self.opt.zero_grad()
        losses, states, outs = self.loss(batch, state)
        total = self.reduce(losses)
        total.backward()
        metrics = self.opt.step()
        for behavior in self.behaviors():
            behavior.update_slow()
        metrics |= summarize(outs)
        metrics |= {f"{name}_loss": loss.detach().mean() for name, loss in losses.items()}
        metrics["loss"] = total.detach()
        observed = {*self.obs_spec.images, *self.obs_spec.vectors, "reward", "cont", "dyn", "rep"}
        metrics["model_loss"] = sum(self.scale(name) * metrics[f"{name}_loss"] for name in losses if name in observed)
        return states.map(torch.Tensor.detach), metrics

    def batch(self, arrays):
        """A batch of the replay as tensors on the device, and the state that its context step lends.

        Args:
          arrays: {key: (B, T + 1, ...)} with latents `deter` and `stoch`, or {key: (B, T, ...)} without, in which case
            every sequence starts from the initial state; or such tensors.
        Returns: {key: (B, T, ...)}, State (B, ...).
        """
        tensors = {key: torch.as_tensor(value).to(self.device, non_blocking=True) for key, value in arrays.items()}
        if not self.latent_size:
            tensors["is_first"][:, 0] = True
            state = self.world.rssm.initial(len(tensors["is_first"]), self.device, self.dtype)
            return tensors, state.map(torch.Tensor.detach)  # to start there is for is_first
        deter, stoch = tensors.pop("deter")[:, 0], tensors.pop("stoch")[:, 0]
        stoch = one_hot(stoch, self.latent_size[1][1])
        known = deter.any(-1)[:, None, None]  # a step that no agent has seen has no latent: the initial state then
        state = State(deter.to(self.dtype), (stoch * known).to(self.dtype))
        return {key: value[:, 1:] for key, value in tensors.items()}, state

    def compress(self, states):
        """State (..., D), (..., S, K) -> tensors: deter float16 (..., D), stoch class indices (..., S)."""
        return states.deter.half(), states.stoch.argmax(-1)

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
          mode: "mode" or "sample" of the task's policy; to collect data, "noisy" for a sample with exploration noise
            and "explore" for such a one of the explorer's policy, if there is one.
        Returns: {key: (N, width) or (width,)} float32 arrays, the new memory. Raises ValueError for another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if self.is_single(obs):
            obs = {key: np.asarray(value)[None] for key, value in obs.items()}
            actions, memory = self.act(obs, memory, mode)
            return {key: value[0] for key, value in actions.items()}, memory
        if "is_first" not in obs:
            obs = {**obs, "is_first": np.full(len(obs[self.world.keys[0]]), memory is None)}
        count = len(obs["is_first"])
        obs = {key: torch.as_tensor(obs[key], device=self.device) for key in [*self.world.keys, "is_first"]}
        state, action = self.chooser(count, mode)(obs, *(memory or self.initial(count)))
        parts = action.cpu().split(list(self.act_spec.widths.values()), -1)
        return {key: part.numpy() for key, part in zip(self.act_spec.widths, parts, strict=True)}, (state, action)

    def chooser(self, count, mode):
        """`choose` for so many environments."""
        return functools.partial(self.choose, mode=mode)

    def choose(self, obs, state, action, mode):
        """What `act` does on the device.

        Args:
          obs: {key: (N, ...)} with is_first; state: State (N, ...); action: (N, A) that led here.
          mode: see `act`.
        Returns: the posterior State (N, ...), actions (N, A).
        """
        obs = {key: value[:, None] for key, value in obs.items()}
        embed = self.world.encode(self.world.preprocess(obs))
        states, _ = self.world.rssm.observe(embed, action[:, None], obs["is_first"], state)
        state = states.map(lambda x: x[:, 0])
        behavior = self.explorer.behavior if mode == "explore" and self.explorer else self.behavior
        action = behavior.act(self.world, state, mode)
        noisy = mode in ("noisy", "explore") and self.expl_noise
        return state, perturb(action, self.act_spec, self.expl_noise) if noisy else action

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
        """What the replay stores of the state in `memory`: for each environment (deter, stoch), or None."""
        if not self.latent_size:
            return [None] * len(memory[1])
        return list(zip(*(latent.cpu().numpy() for latent in self.compress(memory[0])), strict=True))

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
        try:
            self.opt.load_state_dict(saved["opt"])
        except ValueError as error:
            raise UserError(f"the checkpoint is of another agent: {error}") from None
        self.load_state_dict(saved["model"])

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
    """Metrics of an update, 0-d tensors."""
    metrics = {name: outs[name].mean() for name in ("kl", "post_ent", "prior_ent")}
    if "ret" in outs:
        metrics |= behavior_metrics(outs)
    if "explorer" in outs:
        metrics |= {f"expl_{name}": value for name, value in behavior_metrics(outs["explorer"]).items()}
    return metrics


RESERVED = {"policy", "value", "repval", "cont", "dyn", "rep", "deter", "stoch", "disag", "expl_policy", "expl_value"}


def least_size(encoder):
    """Side of the smallest image that an encoder without padding brings down to a single place."""
    side = 1
    for _ in encoder.mults:
        side = 2 * (side - 1) + encoder.kernel
    return side


def check_sizes(spec, config):
    """Raises UserError for names and sizes that no network can have."""
    for key in RESERVED & {*spec.images, *spec.vectors}:
        raise UserError(f"the environment calls an observation {key}, which is the name of a loss or a latent here")
    factor = 2 ** max(len(config.encoder.mults), len(config.decoder.mults))
    for key, shape in spec.images.items():
        if config.decoder.cnn == "valid" and (shape[:2] != (64, 64) or len(config.decoder.mults) != 4):
            raise UserError(f"image {key} is {shape[0]}x{shape[1]}: --decoder.cnn valid needs 64x64 and 4 mults")
        if shape[0] % factor or shape[1] % factor:
            raise UserError(f"image {key} is {shape[0]}x{shape[1]}: --size must be a multiple of {factor}")
        least = least_size(config.encoder) if config.encoder.cnn == "valid" else 0
        if min(shape[:2]) < least:
            raise UserError(f"image {key} is {shape[0]}x{shape[1]}: --encoder.cnn valid needs at least {least}x{least}")
    rssm, decoder = config.rssm, config.decoder
    if rssm.latent != "onehot" and config.replay_context:
        raise UserError(f"--replay_context true stores classes, which --rssm.latent {rssm.latent} has none of")
    if rssm.cell == "block_gru" and rssm.deter % rssm.blocks:
        raise UserError(f"--rssm.deter {rssm.deter} is no multiple of --rssm.blocks {rssm.blocks}")
    widths = {"rssm.deter": rssm.deter, "decoder.depth x decoder.mults[-1]": decoder.depth * decoder.mults[-1]}
    for name, width in widths.items() if spec.images and decoder.cnn == "pool" else ():
        if width % decoder.blocks:
            raise UserError(f"{name} = {width} is no multiple of --decoder.blocks {decoder.blocks}")
    if config.behavior == "cem" and config.cem.elites > config.cem.candidates:
        raise UserError(f"--cem.elites {config.cem.elites} are more than --cem.candidates {config.cem.candidates}")
    if config.return_norm.low > config.return_norm.high:
        raise UserError(
            f"--return_norm.low {config.return_norm.low} is above --return_norm.high {config.return_norm.high}"
        )
