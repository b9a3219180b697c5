"""Dreamer: a world model, a behavior that is learned in it, and one update for both.

Letters: B batch, T time, H imagined steps, N environments or B T start states, E embedding, F features, A actions.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

import modalities
from agents.older import modernize
from agents.showing import pictures
from behaviors import EXPLORING, make_behavior
from behaviors.meta import LEARNED, MetaGradients
from explorers import EXPLORERS, explorer_rewards, make_explorers, perturb, received, task_rewards
from models import WorldModel, frozen
from ops.collectives import average_metrics, place
from ops.compiling import compiled, eagerly
from ops.graphs import Graphs
from ops.layers import MLP
from ops.optim import Adams, LaProp, TFAdams
from ops.random import drawing_from, make_generator
from ops.rates import LearnedRates
from ops.remat import checkpointed, rematerialize
from rssm import State
from tools import Ratio, UserError, derive_seed
from training.console import warn_at
from training.machine import check_compiler, check_scan, choose_graphs

COLLECTING = ("noisy", "explore")  # data
MODES = ("mode", "sample", *COLLECTING)  # of acting
# What is_first (B, T) says of windows without stored latents: that each begins an episode, so that the action that led
# to its first step counts for nothing, or what was recorded (Dreamer).
WINDOW_STARTS = {
    "episode": lambda is_first: torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1),
    "recorded": lambda is_first: is_first,
}
RESERVED = {"policy", "value", "repval", "cont", "dyn", "rep", "deter", "stoch", "disag", "expl_policy", "expl_value"}
RESERVED |= {"embed", "model"}  # what a batch gets besides, and the sum of the world model's losses


class Carry(NamedTuple):
    """Memory of acting: State (N, ...), the last action (N, A), and the carry of the task's behavior itself."""

    state: State
    action: torch.Tensor
    task: Any = ()


class Dreamer:
    """World model, behavior and their optimizer; an explorer with a behavior of its own if `expl_behavior` names one.

    Args:
      obs_spec: ObsSpec; act_spec: ActionSpec; config: the whole configuration.
      device: torch device; dtype: compute dtype.
    """

    def __init__(self, obs_spec, act_spec, config, device="cpu", dtype=torch.float32):
        for key in RESERVED & obs_spec.keys():
            raise UserError(f"the environment calls an observation {key}, which is the name of a loss or a latent here")
        self.obs_spec, self.act_spec = obs_spec, act_spec
        self.device, self.dtype = torch.device(device), dtype
        self.world = WorldModel(obs_spec, act_spec, config, dtype)
        make = functools.partial(make_behavior, feat_size=self.world.feat_size, act_spec=act_spec, config=config)
        self.explorers = make_explorers(self.world, act_spec, config)
        self.rewards = task_rewards(self.world, self.explorers, config)
        self.behavior = make(config.behavior, rewards=self.rewards)
        self.explorer = self.expl_behavior = None
        nets = {"world": self.world, "behavior": self.behavior}
        if config.expl_behavior in EXPLORERS:
            self.explorer = nets["explorer"] = self.explorers[config.expl_behavior]
            self.expl_rewards = explorer_rewards(self.world, self.explorer, config)
            self.expl_behavior = nets["expl_behavior"] = make(
                EXPLORING.get(config.behavior, config.behavior), rewards=self.expl_rewards
            )
        added = {name: source for name, source in self.explorers.items() if source is not self.explorer}
        nets |= {"intrinsic": nn.ModuleDict(added)} if added else {}
        self.nets = nn.ModuleDict(nets).to(self.device)
        self.opt = make_optimizer(self.nets, config)
        self.meta = make_meta(self.behavior, self.rewards, config, self.device)
        self.scales = dict.fromkeys(obs_spec, config.loss_scales.rec) | config.loss_scales.to_dict()
        self.stored = self.world.rssm.layout() if config.replay_context else {}
        self.context = 1 if self.stored else 0
        self.begin_window = WINDOW_STARTS[config.window_start]
        self.batch_size, self.expl_noise = config.batch_size, config.expl_noise
        self.drawers = modalities.drawers(obs_spec, config)
        seeds = {name: derive_seed(config.seed, 5, index, *place()) for index, name in enumerate(("act", "learn"))}
        self.generators = {name: make_generator(seed, self.device) for name, seed in seeds.items()}
        self.capture, self.choosers = lambda function, generator: function, {}

    # -- learning

    def learn(self, replay):
        """Take a gradient step on a batch from the replay and write its fresh latents back; return the metrics."""
        arrays, places = replay.sample(self.batch_size)
        with drawing_from(self.generators["learn"]):
            states, metrics = self.update(*self.batch(arrays))
        if self.stored:
            replay.refresh(places, self.world.rssm.pack(states))
        return metrics

    def update(self, batch, state):
        """Take a gradient step on a batch (see `loss`).

        Returns: the posterior State (B, T, ...) without gradient, {name: 0-d metric}.
        """
        self.opt.zero_grad()
        losses, states, outs = self.loss(batch, state)
        total = self.total(losses)
        total.backward()
        metrics = {}
        if self.meta:
            found = outs["rollout"], outs["imagined"]
            metrics |= self.meta.step(self.world, *found, batch, self.rewards, self.opt)
        metrics |= self.opt.step()
        metrics |= self.behavior.improve(outs["rollout"], outs["imagined"])
        if self.expl_behavior:
            own = self.expl_behavior.improve(outs["expl_rollout"], outs["expl_imagined"])
            metrics |= {f"expl_{name}": value for name, value in own.items()}
        metrics |= summarize(outs, self.behavior, self.expl_behavior)
        metrics |= {f"{name}_loss": loss.detach().mean() for name, loss in losses.items()}
        metrics["loss"] = total.detach()
        metrics["model_loss"] = sum(self.scales[name] * metrics[f"{name}_loss"] for name in outs["model"])
        return states.map(torch.Tensor.detach), average_metrics(metrics)

    def loss(self, batch, state):
        """The one loss of world model, actor and critic, and of the explorer if there is one.

        Args:
          batch: {key: (B, T, ...)} tensors on the agent's device; state: State (B, ...) before the first step.
        Returns: {name: unreduced loss}, the posterior State (B, T, ...), {name: what came up on the way}.
        """
        world, behavior = self.world, self.behavior
        # --- World model: infer the states of the sequence, and predict from them what was observed.
        batch = world.prepare({**batch, "action": self.act_spec.join(batch)})  # action: (B, T, A)
        batch["embed"] = world.encode(batch, learning=True)  # (B, T, E)
        states, post = world.rssm.observe(batch["embed"], batch["action"], batch["is_first"], state)  # (B, T, ...)
        losses, outs = world.losses(states, post, batch)
        outs["model"] = list(losses)

        if self.explorers and world.encoder.drop:  # what was left out is nothing new: explorers see all of it
            with torch.no_grad():
                batch["embed"] = world.encode(batch)

        # --- Imagination: act in the model from every state on, and learn from the rewards predicted there.
        with frozen(world), frozen(self.explorers):
            rollout = outs["rollout"] = behavior.rollout(world, states)  # (H + 1, B T, ...)
            imagined, outs["imagined"] = behavior.losses(world, rollout, batch, self.rewards)  # (H, B T)
        lead = len(batch["reward"]), -1  # B, starts in a sequence: T, or fewer
        losses = joined(losses, {name: loss.mean(0).unflatten(0, lead) for name, loss in imagined.items()})

        # --- Replay: learn from the rewards that were received, too.
        paid = received(self.rewards, states, batch, outs)  # with intrinsic rewards, if they are mixed in
        losses = joined(losses, behavior.replay_losses(world, states, paid, outs["imagined"]))  # (B, T - 1)
        if self.explorers:
            losses = joined(losses, self.expl_losses(states, batch, outs))
        return losses, states, outs

    def expl_losses(self, states, batch, outs):
        """Losses of explorers, and of a behavior of their own by names that begin with expl_; extends `outs`."""
        losses, outs["explorers"] = {}, {}
        for explorer in self.explorers.values():
            own, found = explorer.losses(self.world, states, batch)
            losses, outs["explorers"] = joined(losses, own), outs["explorers"] | found
        if not self.expl_behavior:
            return losses
        received(self.expl_rewards, states, batch, outs)
        with frozen(self.world), frozen(self.explorers):
            rollout = outs["expl_rollout"] = self.expl_behavior.rollout(self.world, states)
            imagined, outs["expl_imagined"] = self.expl_behavior.losses(self.world, rollout, batch, self.expl_rewards)
        lead = len(batch["reward"]), -1
        return joined(losses, {f"expl_{name}": loss.mean(0).unflatten(0, lead) for name, loss in imagined.items()})

    def total(self, losses):
        """{name: loss} -> their weighted sum of means, 0-d; the explorer's weigh as much as the task's."""
        return sum(self.scales.get(name.removeprefix("expl_"), 1.0) * loss.mean() for name, loss in losses.items())

    def batch(self, arrays):
        """Move a replay batch to the device; the stored latent of its context step becomes the initial state.

        Args:
          arrays: {key: (B, T + 1, ...)} with what `stored` names {key: (B, 1 or more, ...)}, or {key: (B, T, ...)}
            without it, in which case every sequence starts from the initial state; or such tensors.
        Returns: {key: (B, T, ...)}, State (B, ...).
        """
        tensors = {key: torch.as_tensor(value).to(self.device, non_blocking=True) for key, value in arrays.items()}
        if not self.stored or not tensors.keys() >= self.stored.keys():
            tensors["is_first"] = self.begin_window(tensors["is_first"])
            state = self.world.rssm.initial(len(tensors["is_first"]), self.device, self.dtype)
            return tensors, state.map(torch.Tensor.detach)  # to start there is for is_first
        stored = {key: tensors.pop(key)[:, 0] for key in self.stored}
        return {key: value[:, 1:] for key, value in tensors.items()}, self.world.rssm.unpack(stored, self.dtype)

    def clock(self, config):
        """Return the clock of the train ratio: replayed steps for each agent step."""
        ratio = config.train_ratio / (config.batch_size * config.batch_length)
        return Ratio(ratio, config.train_burst, config.pretrain)

    def compile_parts(self):
        """Compile what an update spends its time in: one step of each scan, and the behaviors' losses.

        The scans themselves stay Python loops, whose compilation would take minutes.
        """
        self.world.rssm.compile_parts()
        for behavior in (self.behavior, self.expl_behavior):
            if behavior:
                behavior.compile_parts()
        if self.device.type == "cuda":
            compile_rest(self)
        elif self.behavior.policies():  # a planner would be a graph of thousands of kernels
            self.capture = compile_collecting

    # -- acting

    @torch.no_grad()  # a learned start would keep a part of the graph of gradients alive
    def initial(self, count):
        """Return the Carry before the first step of `count` environments."""
        state = self.world.rssm.initial(count, self.device, self.dtype)
        action = torch.zeros(count, self.act_spec.size, device=self.device)
        return Carry(state, action, self.behavior.initial(count, self.device))

    @eagerly
    @torch.no_grad()
    def act(self, obs, carry, mode="sample"):
        """Choose actions.

        Args:
          obs: {key: (N, ...)} arrays with is_first (N,).
          carry: what the last call returned, or `initial(N)`.
          mode: "mode" or "sample" of the task's behavior; to collect data, "noisy" for a sample with exploration noise
            and "explore" for such a one of the explorer's behavior, if there is one.
        Returns: {key: (N, width)} float32 arrays, the next Carry, and {key: (N, ...)} for the replay when collecting.
        Raises ValueError for another mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        count = len(obs["is_first"])
        if (count, mode) not in self.choosers:
            choose = functools.partial(self.choose, mode=mode)
            self.choosers[count, mode] = self.capture(choose, self.generators["act"])
        obs = {key: torch.as_tensor(obs[key], device=self.device) for key in [*self.obs_spec, "is_first"]}
        with drawing_from(self.generators["act"]):
            carry = self.choosers[count, mode](obs, carry)
        actions = {key: part.numpy() for key, part in self.act_spec.split(carry.action.cpu()).items()}
        stored = self.world.rssm.pack(carry.state) if self.stored and mode in COLLECTING else {}
        return actions, carry, {key: value.cpu().numpy() for key, value in stored.items()} or None

    def choose(self, obs, carry, mode):
        """Do the part of `act` on the device: {key: (N, ...)} tensors with is_first, Carry -> the next Carry."""
        world, first = self.world, obs["is_first"]
        obs = {key: value[:, None] for key, value in obs.items()}  # (N, 1, ...)
        embed = world.encode(world.encoder.prepare(obs))  # (N, 1, E)
        states, _ = world.rssm.observe(embed, carry.action[:, None], obs["is_first"], carry.state)
        state = states.map(lambda x: x[:, 0])  # (N, ...)
        fresh = self.initial(first.shape[0]) if tree_leaves(carry.task) else carry
        task = tree_map(functools.partial(restart, first), fresh.task, carry.task)
        if mode == "explore" and self.expl_behavior:  # which carries nothing
            action, _ = self.expl_behavior.act(world, state, (), mode)
        else:
            action, task = self.behavior.act(world, state, task, mode)
        if mode in COLLECTING and self.expl_noise:
            action = perturb(action, self.act_spec, self.expl_noise)
        return Carry(state, action, task)

    @eagerly
    def report(self, arrays, seen, carry=None):
        """Show what the model expects: {key: films}, as the key's modality draws them.

        Args:
          arrays: {key: (B, T, ...)} as the replay gives them; the first `seen` steps are seen, and the rest imagined
            from the actions alone. carry: of the agent before the first step, if it is known.
        """
        if not self.drawers:
            return {}
        batch, state = self.batch(arrays)
        with torch.no_grad(), drawing_from(self.generators["act"]):
            prepared = self.world.prepare({**batch, "action": self.act_spec.join(batch)})
            model = self.world.open_loop(prepared, carry.state if carry else state, seen)
        pairs = {key: (batch[key].cpu().numpy(), model[key].float().cpu().numpy()) for key in self.drawers}
        return {key: draw(*pairs[key], seen) for key, draw in self.drawers.items()}

    pictures = pictures  # of what its behavior is after

    # -- saving

    def state_dict(self):
        """Return all that learning depends on: parameters, slow critic, normalizer, optimizer; and the specs."""
        model = self.nets.state_dict()
        spaces = {f"{seen.kind} {key}": seen.shape for key, seen in self.obs_spec.items()}
        spaces |= {f"action {key}": width for key, width in self.act_spec.widths.items()}
        shapes = spaces | {name: tuple(value.shape) for name, value in model.items()}
        return {
            "model": model,
            "opt": self.opt.state_dict(),
            "signature": {name: str(shape) for name, shape in shapes.items()},
            "specs": {"observation": self.obs_spec.plain(), "action": self.act_spec._asdict()},
            **({"meta": self.meta.state_dict()} if self.meta else {}),
        }

    def load_state_dict(self, saved):
        """Undo `state_dict`, also of older versions. Raises UserError that names both shapes of another agent's."""
        if "model" not in saved:
            raise UserError("the checkpoint is of another agent: it has learned nothing")
        saved, own = modernize(saved, self.nets), self.state_dict()
        for kind in ("signature", *own["specs"]):  # equal sizes may be of other classes
            theirs, ours = (x[kind] if kind in x else x["specs"].get(kind) for x in (saved, own))
            for name, (there, here) in differences(theirs, ours).items() if theirs else ():
                where = f"{kind} {name}:" if kind != "signature" else f"{name} is"
                raise UserError(f"the checkpoint is of another agent: {where} {there} there and {here} here")
        try:
            self.opt.load_state_dict(saved["opt"])
        except ValueError as error:
            raise UserError(f"the checkpoint is of another agent: {error}") from None
        self.nets.load_state_dict(saved["model"])
        if self.meta and "meta" in saved:
            self.meta.load_state_dict(saved["meta"])


def make(obs_spec, act_spec, config, device, dtype):
    """Return the Dreamer of a configuration, compiled and recorded as CUDA graphs if it says so."""
    recorded = choose_graphs(config.graphs, device)
    check_scan(config.ops.scan, device)
    agent = Dreamer(obs_spec, act_spec, config, device, dtype)
    if config.compile:
        check_compiler()
        agent.compile_parts()
    if config.remat:
        remat_parts(agent)
    if recorded:
        capture_parts(agent, Graphs(functools.partial(no_graphs, config)))
    return agent


def compile_rest(agent):
    """Compile what a GPU would get as many small kernels, besides: encoder, predictions and the losses of replay.

    On a CPU they took 17 s more at every start, and no update took less time that could be seen: docs/performance.md.
    """
    for part, name in [(agent.world, "encode"), (agent.world, "losses"), (agent.behavior, "replay_losses")]:
        setattr(part, name, torch.compile(getattr(part, name), dynamic=False))


def compile_collecting(choose, generator):
    """Return a chooser of actions, compiled if it collects data; evaluations are too short to pay for that."""
    return compiled(choose) if choose.keywords["mode"] in COLLECTING else choose


def remat_parts(agent):
    """Let what takes most of an update's memory keep only its inputs for the backward pass, which computes it anew.

    That are the steps of the scan, encoder and decoder, and the behavior's networks on what was imagined.
    """
    behaviors = [behavior for behavior in (agent.behavior, agent.expl_behavior) if behavior]
    nets = [net for behavior in behaviors for net in behavior.optimized().values()]
    parts = [*agent.world.encoder.parts.values(), *agent.world.decoder.parts.values()]
    for module in [*parts, *(module for net in nets for module in net.modules() if isinstance(module, MLP))]:
        rematerialize(module)
    agent.world.rssm.call_step = functools.partial(checkpointed, agent.world.rssm.call_step)


def capture_parts(agent, graphs):
    """Let the kernels of a whole update, and those of acting, become one CUDA graph each.

    graphs: `ops.graphs.Graphs`, or a function that stands for it.
    """
    agent.capture = graphs
    agent.update = graphs(agent.update, agent.generators["learn"])


def no_graphs(config, why):
    """Warn that a run goes on without CUDA graphs; raise UserError where they were asked for."""
    if config.graphs == "true":
        raise UserError(f"--graphs true: {why}; take --graphs false")
    warn_at(config.log_level, f"{why}; the run goes on without, several times slower if the model is small")


def make_optimizer(nets, config):
    """Return one LaProp for all parameters, or an Adam for each group: model, actor, critic, and the explorer's.

    What a behavior trains by itself is in neither.
    """
    modules = {"model": nets["world"], **nets["behavior"].optimized()}
    explorers = nn.ModuleDict({name: nets[name] for name in ("explorer", "intrinsic") if name in nets})
    own = nets["expl_behavior"].optimized().items() if "expl_behavior" in nets else ()
    modules |= {"expl_model": explorers, **{f"expl_{group}": module for group, module in own}}
    trained = {param for module in modules.values() for param in module.parameters()}
    names = {param: name for name, param in nets.named_parameters() if param.requires_grad and param in trained}
    if config.optimizer == "laprop":
        opt = LaProp({name: param for param, name in names.items()}, **config.opt.to_dict())
        return with_learned_rates(opt, nets, names, config.meta)
    groups = {g: {names[p]: p for p in module.parameters() if p in names} for g, module in modules.items()}
    groups = {group: params for group, params in groups.items() if params}  # an explorer may only count
    sections = {"model": config.model_opt, "critic": config.critic_opt, "expl_model": config.expl_opt}
    settings = {g: sections.get(g, sections.get(g.removeprefix("expl_"), config.actor_opt)) for g in groups}
    return with_learned_rates(ADAMS[config.optimizer](groups, settings), nets, names, config.meta)


def with_learned_rates(opt, nets, names, config):
    """Return an optimizer as it is, or one whose rates of actors or critics learn; names: {parameter: its name}.

    Raises UserError if there is no such rate, or if its factor may not be where it is to start.
    """
    groups, rates = {}, [name for name in config.learn if name.endswith("_lr")]
    if rates and not 1 / config.limit <= config.start <= config.limit:
        limit = f"--meta.limit {config.limit:g} leaves factors from {1 / config.limit:g} to {config.limit:g}"
        raise UserError(f"--meta.start {config.start:g}: {limit}")
    for kind in ("actor", "critic"):
        modules = [nets[net].optimized().get(kind) for net in ("behavior", "expl_behavior") if net in nets]
        if f"{kind}_lr" in config.learn:
            groups[kind] = {names[p]: p for module in modules if module for p in module.parameters() if p in names}
            if not groups[kind] and not nets["behavior"].policies():
                raise UserError(f"--meta.learn {kind}_lr: the behavior has no {kind} with a rate")
    groups = {kind: params for kind, params in groups.items() if params}  # others have optimizers of their own
    return LearnedRates(opt, groups, config.rate, config.limit, config.start) if groups else opt


def make_meta(behavior, rewards, config, device):
    """Return the MetaGradients of a behavior's constants and of the weight of its intrinsic rewards; None for none."""
    names = [name for name in config.meta.learn if name in LEARNED]
    return MetaGradients(behavior, names, config).to(device).attach(behavior, rewards) if names else None


ADAMS = {"adam": Adams, "tf_adam": TFAdams}


def restart(first, fresh, leaf):
    """A leaf (N, ...) of a carry, fresh where an episode starts."""
    return torch.where(first.view(-1, *[1] * (leaf.ndim - 1)), fresh, leaf)


@torch.no_grad()
def summarize(outs, behavior, expl_behavior):
    """Return the metrics of what came up in `loss`, 0-d tensors."""
    metrics = {name: outs[name].mean() for name in ("kl", "post_ent", "prior_ent")}
    metrics |= behavior.metrics(outs["imagined"])
    if expl_behavior:
        metrics |= {f"expl_{name}": value for name, value in expl_behavior.metrics(outs["expl_imagined"]).items()}
    return metrics | outs["shares"] | {f"intrinsic/{name}": x.mean() for name, x in outs.get("explorers", {}).items()}


def joined(losses, more):
    """Join two dicts of losses. Raises UserError for a name that is in both, as an observation may have a loss's."""
    for name in losses.keys() & more.keys():
        raise UserError(f"the environment calls an observation {name}, which is the name of a loss here")
    return losses | more


def differences(theirs, ours):
    """Return {name: (theirs, ours)} of what differs between two mappings, 'absent' for what one of them lacks."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = {name: (theirs.get(name, "absent"), ours.get(name, "absent")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
