"""World Models (Ha and Schmidhuber, 2018, arXiv:1803.10122): a dream that one can train in.

V, a variational autoencoder, sees z. M, a recurrent network, predicts the next z as a mixture of Gaussians. C, one
linear layer, acts on z and M's state, and is found by an evolution strategy, in M's dream or in the real environment.
One is learned after the other.

Letters: B batch, T time, N environments or dreams, P candidates, Z latent numbers, H width of M, A actions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import modalities
from agents.world_models.controller import Controller, Evolution, wander
from agents.world_models.dream import STARTS, Dream, first_latents
from agents.world_models.memory import MDNRNN, Memory, sample
from agents.world_models.stages import COLLECT, MEMORY, PLAY, SCORE, VISION, Auditions, Stages
from agents.world_models.vision import Vision, draw
from ops.random import drawing_from, make_generator
from tools import UserError, derive_seed

COLLECTING = ("noisy", "explore")


class Carry(NamedTuple):
    """Memory of acting: M's state (N, H), the last latent (N, Z) and action (N, A)."""

    memory: Memory
    z: torch.Tensor
    action: torch.Tensor


def make(obs_spec, act_spec, config, device, dtype):
    """Return the agent of a configuration. It computes in float32."""
    return WorldModels(obs_spec, act_spec, config, device)


class WorldModels:
    """V, M and C, learned in stages; see `training.protocol.Agent`.

    Args:
      obs_spec: ObsSpec; act_spec: ActionSpec; config: the whole configuration; device: torch device.
    """

    stored: dict[str, Any] = {}
    context = 0

    def __init__(self, obs_spec, act_spec, config, device="cpu"):
        stages = config.stages
        self.obs_spec, self.act_spec, self.config = obs_spec, act_spec, stages
        self.device, self.batch_size = torch.device(device), config.batch_size
        self.vision = Vision(obs_spec, config)
        self.drawers = modalities.drawers(obs_spec, config)
        self.memory = MDNRNN(stages.z, act_spec.size, stages.hidden, stages.mixtures, stages.predict == "change")
        self.nets = nn.ModuleDict({"vision": self.vision, "memory": self.memory}).to(self.device)
        rates = {self.vision: stages.v_lr, self.memory: stages.m_lr}
        self.opts = {net: torch.optim.Adam(net.parameters(), lr) for net, lr in rates.items()}
        self.controller = Controller(stages.z + stages.hidden * (stages.inputs == "zh"), act_spec)
        self.dream = Dream(self.memory, self.controller, stages)
        self.seeds = [derive_seed(config.seed, 7, round) for round in range(stages.rounds)]
        self.stages = Stages(stages)
        self.evolution = self.new_evolution()
        self.auditions: Auditions | None = None
        self.best, self.best_score = np.zeros(self.controller.size, np.float32), -np.inf
        self.score = -np.inf  # of the mean that was scored last
        self.starts: torch.Tensor | None = None  # mean and log-variance (2, S, Z) of first latents
        seeds = {name: derive_seed(config.seed, 5, index) for index, name in enumerate(("act", "learn"))}
        self.generators = {name: make_generator(seed, self.device) for name, seed in seeds.items()}

    def new_evolution(self):
        """Return the evolution strategy of this round."""
        stages = self.config
        seed = self.seeds[min(self.stages.round, stages.rounds - 1)]
        return Evolution(self.controller.size, stages.population, stages.sigma, seed)

    def clock(self, config):
        """Return the clock of the learn calls: they come when a stage has what it needs."""
        return self.stages

    # -- learning

    def learn(self, replay):
        """Do the next piece of work of the stage: an update of V or of M, or a generation of C."""
        with drawing_from(self.generators["learn"]):
            if self.stages.name in (VISION, MEMORY):
                net = self.vision if self.stages.name == VISION else self.memory
                return self.update(net, tensors(replay.sample(self.batch_size)[0], self.device))
            return self.evolve(replay)

    def update(self, net, batch):
        """Take a gradient step of V or M on a batch {key: (B, T, ...)}; return the metrics."""
        if net is self.memory:
            with torch.no_grad():  # the latents are drawn anew
                batch["z"] = draw(*self.vision.encode(self.vision.encoder.prepare(batch)))
            names = "reward", "is_terminal", "is_first"
            loss, metrics = net.loss(batch["z"], self.act_spec.join(batch), *(batch[name] for name in names))
        else:
            loss, metrics = net.loss(batch)
        self.opts[net].zero_grad()
        loss.backward()
        if net is self.memory:
            nn.utils.clip_grad_value_(net.parameters(), self.config.m_clip)
        self.opts[net].step()
        return metrics

    def evolve(self, replay):
        """Tell the strategy the fitness of its candidates, from dreams or from episodes; return metrics."""
        if self.config.train_in == "env":
            fitness = self.auditions.scores.mean(1)
            self.auditions = None
        else:
            if self.starts is None:
                batches = (tensors(replay.sample(self.batch_size)[0], self.device) for _ in range(STARTS))
                self.starts = first_latents(self.vision, batches)
            fitness = self.dream.fitness(self.evolution.candidates, self.starts, self.generators["learn"])
        self.evolution.tell(fitness)
        numbers = {"fitness_mean": fitness.mean(), "fitness_best": fitness.max(), "sigma": self.evolution.step_size}
        if self.best_score > -np.inf:
            numbers |= {"score": self.score, "score_best": self.best_score}
        return {name: torch.tensor(float(value)) for name, value in numbers.items()}

    # -- acting

    def initial(self, count):
        """Return the Carry before the first step of `count` environments."""
        z, action = (torch.zeros(count, size, device=self.device) for size in (self.config.z, self.act_spec.size))
        return Carry(self.memory.initial(count, self.device), z, action)

    @torch.no_grad()
    def act(self, obs, carry, mode="sample"):
        """Choose actions; in collecting modes, also bring what the stage waits for. See `training.protocol.Agent`."""
        collecting = mode in COLLECTING
        if collecting:
            self.note(obs)
        with drawing_from(self.generators["act"]):
            carry = self.perceive(obs, carry, mode)
            if collecting and self.stages.name == COLLECT and self.stages.round == 0:
                action = wander(self.act_spec, self.config.policy, carry.action, obs["is_first"])
            else:
                weights = torch.from_numpy(self.weights(len(obs["is_first"]), collecting)).to(self.device)
                action = self.controller.act(carry.z, carry.memory.h, weights)
        parts = {key: part.cpu().numpy() for key, part in self.act_spec.split(action).items()}
        return parts, carry._replace(action=action), None

    def perceive(self, obs, carry, mode):
        """Return the Carry of the present: V's latent, and M's state after the step that led here."""
        first = torch.as_tensor(obs["is_first"], device=self.device)[:, None]
        memory = self.memory.step(carry.z, carry.action, carry.memory)
        memory = Memory(*(torch.where(first, 0.0, part) for part in memory))
        batch = {key: torch.as_tensor(obs[key], device=self.device)[:, None] for key in self.obs_spec}
        mean, logvar = (x[:, 0] for x in self.vision.encode(self.vision.encoder.prepare(batch)))
        return Carry(memory, mean if mode == "mode" else draw(mean, logvar), carry.action)

    def weights(self, count, collecting):
        """Return C's weights (N, size): those on trial where candidates are scored, else the best mean so far.

        That is the last round's until this one has a generation, and the present mean until one has a score.
        """
        if collecting and self.auditions:
            return np.stack([self.auditions.weights_of(env) for env in range(count)])
        best = self.best if self.best_score > -np.inf or not self.evolution.told else self.evolution.mean
        return np.repeat(best[None], count, 0)

    def note(self, obs):
        """Account for rewards and the ends and starts of episodes, where candidates are scored."""
        if self.stages.name not in (PLAY, SCORE):
            return
        if self.auditions is None:
            playing = self.stages.name == PLAY
            weights = self.evolution.candidates if playing else self.evolution.mean[None]
            self.auditions = Auditions(weights, self.config.rollouts if playing else self.config.score_episodes)
        for env, first in enumerate(obs["is_first"]):
            if first:
                self.auditions.begin(env)
            else:
                self.auditions.reward(env, obs["reward"][env], obs["is_last"][env])
        self.stages.played = self.auditions.share()
        if self.auditions.complete():
            self.conclude()

    def conclude(self):
        """Act on scores that are complete: keep the best mean, go on to the next stage."""
        if self.stages.name == SCORE:
            self.score = float(self.auditions.scores.mean())
            if self.score > self.best_score:
                self.best, self.best_score = self.auditions.weights[0].copy(), self.score
            self.auditions = None
        self.stages.scored()
        if self.stages.name == COLLECT:  # for another round, whose V and M will be others: no score holds for them
            self.evolution, self.starts, self.best_score = self.new_evolution(), None, -np.inf

    # -- what it expects, and saving

    @torch.no_grad()
    def report(self, arrays, seen, carry=None):
        """Show V's reconstructions of `seen` steps, then M's dream on the recorded actions."""
        if not self.drawers:
            return {}
        batch = tensors(arrays, self.device)
        action, first = self.act_spec.join(batch), batch["is_first"]
        with drawing_from(self.generators["act"]):
            latents = list(self.vision.encode(self.vision.encoder.prepare(batch))[0].unbind(1))  # means, T of (B, Z)
            memory = self.memory.initial(len(first), self.device)
            if carry:  # the step that led here
                memory = self.memory.step(carry.z, action[:, 0], carry.memory)
            for t in range(len(latents) - 1):
                keep = ~first[:, t, None]
                memory = self.memory.step(latents[t], action[:, t + 1], Memory(*(part * keep for part in memory)))
                if t + 1 >= seen:
                    latents[t + 1] = sample(self.memory.predict(latents[t], memory.h), self.config.temperature)
            model = self.vision.decode(torch.stack(latents, 1))
        pairs = {key: (batch[key].cpu().numpy(), model[key].mode().float().cpu().numpy()) for key in self.drawers}
        return {key: draw(*pairs[key], seen) for key, draw in self.drawers.items()}

    def state_dict(self):
        """Return networks and their optimizers, the evolution and its scores, the best C, and the specs."""
        return {
            "model": self.nets.state_dict(),
            "opts": [opt.state_dict() for opt in self.opts.values()],
            "stages": self.stages.place(),
            "evolution": self.evolution.state_dict(),
            "auditions": self.auditions.state_dict() if self.auditions else None,
            "best": {"weights": torch.from_numpy(self.best), "score": self.best_score, "last": self.score},
            "starts": self.starts,
            "specs": {"observation": self.obs_spec.plain(), "action": self.act_spec._asdict()},
        }

    def load_state_dict(self, state):
        """Undo `state_dict`. Raises UserError if it is another agent's."""
        if "evolution" not in state:
            raise UserError("the checkpoint is of another agent: it has no evolution of a controller")
        here = {name: tuple(value.shape) for name, value in self.nets.state_dict().items()}
        here |= {"C": self.best.shape, "a generation": (self.config.population,)}
        there = {name: tuple(value.shape) for name, value in state["model"].items()}
        there["C"] = tuple(state["best"]["weights"].shape)
        there["a generation"] = tuple(state["evolution"]["told"].shape[1:])
        for name in here.keys() | there.keys():
            if here.get(name) != there.get(name):
                pair = f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
                raise UserError(f"the checkpoint is of another agent: {name} is {pair}")
        self.nets.load_state_dict(state["model"])
        for opt, saved in zip(self.opts.values(), state["opts"], strict=True):
            opt.load_state_dict(saved)
        self.stages.go_to(state["stages"])
        self.evolution = self.new_evolution()
        self.evolution.load_state_dict(state["evolution"])
        self.auditions = Auditions.read(state["auditions"]) if state["auditions"] else None
        self.best, self.best_score = state["best"]["weights"].numpy().copy(), state["best"]["score"]
        self.score = state["best"].get("last", self.best_score)  # older ones lack it
        self.starts = state["starts"]


def tensors(arrays, device):
    """Return a replay batch {key: (B, T, ...)} as tensors on a device."""
    return {key: torch.as_tensor(value).to(device) for key, value in arrays.items()}
