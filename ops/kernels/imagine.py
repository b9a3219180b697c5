"""Imagination of DreamerV3 on a GPU: policy, recurrent cell and prior of all steps in one Triton kernel.

A program computes a few sequences and loops over time, as sequences do not depend on each other; what passes from one
layer to the next goes through memory. There is no gradient, as DreamerV3's actor learns by REINFORCE.
`models.ImagBehavior.rollout` says what is computed.

Letters: N sequences, D deter, G blocks of W = D / G, H hidden, S groups x K classes, U units of the actor, A actions,
V choices of at most Q classes. In the kernel: M sequences of a program, C columns that it computes together.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ops.kernels.parts import pair, probabilities, tanh
from ops.layers import EPS

# Sequences of a program; columns, and rows of a weight, that it reads together; its warps: the fastest on an H200.
ROWS, COLUMNS, TILE, WARPS = 16, 64, 64, 8


class Weights(NamedTuple):
    """Of the layers of a step, in their order: kernels (in, out), of blocks (G, in, out), biases and scales.

    policy, prior: the first hidden layer of each; policies, priors: the others (layers, in, out); act: the actor's
    outputs (U, 2 A), means and logits, then what deviations are made of; deter, stoch, action: the cell's inputs;
    hidden: its block layer (G, W + 3 H, W); gates (G, W, 3 W); logit: the prior's output.
    """

    policy: torch.Tensor
    policy_bias: torch.Tensor
    policy_scale: torch.Tensor
    policies: torch.Tensor
    policies_bias: torch.Tensor
    policies_scale: torch.Tensor
    act: torch.Tensor
    act_bias: torch.Tensor
    action: torch.Tensor
    action_bias: torch.Tensor
    action_scale: torch.Tensor
    deter: torch.Tensor
    deter_bias: torch.Tensor
    deter_scale: torch.Tensor
    stoch: torch.Tensor
    stoch_bias: torch.Tensor
    stoch_scale: torch.Tensor
    hidden: torch.Tensor
    hidden_bias: torch.Tensor
    hidden_scale: torch.Tensor
    gates: torch.Tensor
    gates_bias: torch.Tensor
    prior: torch.Tensor
    prior_bias: torch.Tensor
    prior_scale: torch.Tensor
    priors: torch.Tensor
    priors_bias: torch.Tensor
    priors_scale: torch.Tensor
    logit: torch.Tensor
    logit_bias: torch.Tensor

    @classmethod
    def of(cls, rssm, actor, dtype):
        """Take them from a rssm.RSSM and an Actor, without gradient and in a dtype but for the scales."""
        cell, (prior, logit) = rssm.cell, rssm.prior
        inputs = [x for embed in (cell.embed_action, cell.embed_deter, cell.embed_stoch) for x in layers(embed)[:3]]
        hidden = *pair(cell.hidden[0]), cell.norms[0].scale
        found = cls(
            *layers(actor.mlp), *outputs(actor), *inputs, *hidden, *pair(cell.gates), *layers(prior), *pair(logit)
        )
        found = (x if name.endswith("_scale") else x.to(dtype) for name, x in found._asdict().items())
        return cls(*(x.detach().contiguous() for x in found))


def layers(mlp):
    """Return kernel, bias and scale of an MLP's first layer, and the same of all others, stacked."""
    linear, norms = list(mlp)[::2], list(mlp)[1::2]
    kinds = zip(*((*pair(layer), norm.scale) for layer, norm in zip(linear, norms, strict=True)), strict=True)
    kinds = [(first, torch.stack(rest) if rest else first.new_empty(0)) for first, *rest in kinds]
    return *(first for first, _ in kinds), *(rest for _, rest in kinds)


def outputs(actor):
    """Return kernel (U, 2 A) and bias of what an actor puts out; what choices have in place of deviations is zero."""
    first = [pair(head.outs["logits" if head.classes else "mean"]) for head in actor.heads]
    second = [
        [torch.zeros_like(x) for x in own] if head.classes else pair(head.outs["stddev"])
        for head, own in zip(actor.heads, first, strict=True)
    ]
    return [torch.cat(parts, -1) for parts in zip(*first, *second, strict=True)]


class Places(NamedTuple):
    """Places of an action's parts, int32.

    begin, size, drawn: of each choice, its first column, its classes, and the column of its noise (V,); number: of each
    column, that of its noise, or -1 for one of a choice (A,).
    """

    begin: torch.Tensor
    size: torch.Tensor
    drawn: torch.Tensor
    number: torch.Tensor

    @classmethod
    def of(cls, spec, device):
        """Take them from an ActionSpec."""
        column, noise, choices, numbers = 0, 0, [], []
        for key, width in spec.widths.items():
            if key in spec.classes:
                for size in spec.classes[key]:
                    choices.append((column, size, noise))
                    column, noise = column + size, noise + 1
                numbers += [-1] * width
            else:
                numbers += range(noise, noise + width)
                column, noise = column + width, noise + width
        found = *zip(*choices or [(0, 0, 0)], strict=True), numbers
        return cls(*(torch.tensor(x, dtype=torch.int32, device=device) for x in found))


@triton.jit
def add_product(
    total, x, stride, rows: tl.constexpr, w, width: tl.constexpr, j, inside, live, M: tl.constexpr, tile: tl.constexpr
):
    """Add M sequences' inputs (M, rows), `stride` apart, times columns j of a weight (rows, width) to (M, C)."""
    m = tl.arange(0, M)
    for begin in range(0, rows, tile):
        i = begin + tl.arange(0, tile)
        part = tl.load(x + m[:, None] * stride + i[None, :], mask=live[:, None] & (i[None, :] < rows), other=0.0)
        weight = tl.load(w + i[:, None] * width + j[None, :], mask=(i[:, None] < rows) & inside[None, :], other=0.0)
        total = tl.dot(part, weight, total, input_precision="ieee")
    return total


@triton.jit
def affine(
    into, out_stride, x, stride, rows: tl.constexpr, y, y_stride, more: tl.constexpr, w, b, n: tl.constexpr, live,
    M: tl.constexpr, C: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Store [x, y] @ w + b (M, n) of inputs (M, rows) and (M, more); return the sums of its squares (M,)."""
    m, squares = tl.arange(0, M), tl.zeros((M,), tl.float32)
    for begin in range(0, n, C):
        j = begin + tl.arange(0, C)
        inside = j < n
        total = tl.zeros((M, C), tl.float32) + tl.load(b + j, mask=inside, other=0.0).to(tl.float32)[None, :]
        total = add_product(total, x, stride, rows, w, n, j, inside, live, M, tile)
        if more > 0:
            total = add_product(total, y, y_stride, more, w + rows * n, n, j, inside, live, M, tile)
        tl.store(into + m[:, None] * out_stride + j[None, :], total, mask=live[:, None] & inside[None, :])
        squares += tl.sum(total * total, 1)
    tl.debug_barrier()
    return squares


@triton.jit
def norm_silu_rows(x, stride, squares, s, n: tl.constexpr, live, M: tl.constexpr, C: tl.constexpr, eps: tl.constexpr):
    """Replace x (M, n), of which the sums of squares are known, by silu(x / rms(x) * s)."""
    m, inverse = tl.arange(0, M), 1 / tl.sqrt(squares / n + eps)
    for begin in range(0, n, C):
        j = begin + tl.arange(0, C)
        at, mask = x + m[:, None] * stride + j[None, :], live[:, None] & (j[None, :] < n)
        scale = tl.load(s + j, mask=j < n, other=0.0).to(tl.float32)
        y = tl.load(at, mask=mask, other=0.0).to(tl.float32) * inverse[:, None] * scale[None, :]
        tl.store(at, y * tl.sigmoid(y), mask=mask)
    tl.debug_barrier()


@triton.jit
def layer(
    into, out_stride, x, stride, rows: tl.constexpr, y, y_stride, more: tl.constexpr, w, b, s, n: tl.constexpr, live,
    M: tl.constexpr, C: tl.constexpr, eps: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Compute a hidden layer (M, n) of inputs (M, rows) and (M, more)."""
    squares = affine(into, out_stride, x, stride, rows, y, y_stride, more, w, b, n, live, M, C, tile)
    norm_silu_rows(into, out_stride, squares, s, n, live, M, C, eps)


@triton.jit
def mlp(
    one, other, x, rows: tl.constexpr, y, more: tl.constexpr, w, b, s, ws, bs, ss, n: tl.constexpr, L: tl.constexpr,
    live, M: tl.constexpr, C: tl.constexpr, eps: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Compute hidden layers (M, n) of inputs (M, rows) and (M, more): a first and L more; return where the last is."""
    layer(one, n, x, rows, rows, y, more, more, w, b, s, n, live, M, C, eps, tile)
    last, free = one, other
    for index in range(L):
        weight = ws + index * n * n
        layer(free, n, last, n, n, last, n, 0, weight, bs + index * n, ss + index * n, n, live, M, C, eps, tile)
        before = last
        last = free
        free = before
    return last


@triton.jit
def draw(logit, inside, size, noise, unimix: tl.constexpr):
    """Draw classes (R,) by softmax(logit) (R, K), mixed with `unimix` of a uniform choice of `size` (R,) classes."""
    classes = tl.arange(0, logit.shape[1])
    probs = tl.where(inside, (1 - unimix) * probabilities(logit, inside) + unimix / size[:, None], 0.0)
    passed = (noise[:, None] >= tl.cumsum(probs, 1)) & (classes[None, :] < size[:, None] - 1)
    return tl.sum(passed.to(tl.int32), 1)


@triton.jit
def choose(
    action, taken, out, noise, begins, sizes, drawn, numbers, room,
    A: tl.constexpr, V: tl.constexpr, ON: tl.constexpr, PA: tl.constexpr, PV: tl.constexpr, PQ: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, unimix: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Draw actions (M, A) from the actor's outputs (M, 2 A), for `room` sequences; the cell sees `taken`, at most 1."""
    m, j = tl.arange(0, M), tl.arange(0, PA)
    number = tl.load(numbers + j, mask=j < A, other=-1)
    at, mask = m[:, None] * A + j[None, :], (m[:, None] < room) & (number[None, :] >= 0)
    mean = tanh(tl.load(out + m[:, None] * 2 * A + j[None, :], mask=mask, other=0.0).to(tl.float32))
    spread = tl.load(out + m[:, None] * 2 * A + A + j[None, :], mask=mask, other=0.0).to(tl.float32)
    random = tl.load(noise + m[:, None] * ON + number[None, :], mask=mask, other=0.0)
    value = mean + ((high - low) * tl.sigmoid(spread + 2) + low) * random
    tl.store(action + at, value, mask=mask)
    tl.store(taken + at, value / tl.maximum(tl.abs(value), 1.0), mask=mask)
    if V > 0:
        r, c = tl.arange(0, M * PV), tl.arange(0, PQ)
        row, choice = r // PV, r % PV
        real = (choice < V) & (row < room)
        begin = tl.load(begins + choice, mask=choice < V, other=0)
        size = tl.load(sizes + choice, mask=choice < V, other=1)
        inside = c[None, :] < size[:, None]
        mask = real[:, None] & inside
        logit = tl.load(out + row[:, None] * 2 * A + begin[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        random = tl.load(noise + row * ON + tl.load(drawn + choice, mask=choice < V, other=0), mask=real, other=0.0)
        hit = (c[None, :] == draw(logit, inside, size, random, unimix)[:, None]).to(tl.float32)
        at = row[:, None] * A + begin[:, None] + c[None, :]
        tl.store(action + at, hit, mask=mask)
        tl.store(taken + at, hit, mask=mask)
    tl.debug_barrier()


@triton.jit
def next_deter(
    deter, old, stoch, taken, joint, hidden,
    w_action, b_action, s_action, w_deter, b_deter, s_deter, w_stoch, b_stoch, s_stoch,
    w_hidden, b_hidden, s_hidden, w_gates, b_gates, live,
    A: tl.constexpr, D: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SK: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, eps: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Compute the next deter (M, D): `rssm.BlockGRU.forward`."""
    W: tl.constexpr = D // G
    layer(joint, 3 * H, old, D, D, old, D, 0, w_deter, b_deter, s_deter, H, live, M, C, eps, tile)
    layer(joint + H, 3 * H, stoch, SK, SK, stoch, SK, 0, w_stoch, b_stoch, s_stoch, H, live, M, C, eps, tile)
    layer(joint + 2 * H, 3 * H, taken, A, A, taken, A, 0, w_action, b_action, s_action, H, live, M, C, eps, tile)
    m, squares = tl.arange(0, M), tl.zeros((M,), tl.float32)
    for g in range(G):
        w, b = w_hidden + g * (W + 3 * H) * W, b_hidden + g * W
        squares += affine(
            hidden + g * W, D, old + g * W, D, W, joint, 3 * H, 3 * H, w, b, W, live, M, C, tile
        )  # fmt: skip
    norm_silu_rows(hidden, D, squares, s_hidden, D, live, M, C, eps)
    for g in range(G):
        x, w, b = hidden + g * W, w_gates + g * 3 * W * W, b_gates + g * 3 * W
        for begin in range(0, W, C):
            j = begin + tl.arange(0, C)
            inside, zeros = j < W, tl.zeros((M, C), tl.float32)
            reset = add_product(zeros, x, D, W, w, 3 * W, j, inside, live, M, tile)
            reset += tl.load(b + j, mask=inside, other=0.0).to(tl.float32)[None, :]
            cand = add_product(zeros, x, D, W, w, 3 * W, W + j, inside, live, M, tile)
            cand += tl.load(b + W + j, mask=inside, other=0.0).to(tl.float32)[None, :]
            update = add_product(zeros, x, D, W, w, 3 * W, 2 * W + j, inside, live, M, tile)
            update += tl.load(b + 2 * W + j, mask=inside, other=0.0).to(tl.float32)[None, :]
            at, mask = m[:, None] * D + g * W + j[None, :], live[:, None] & inside[None, :]
            before = tl.load(old + at, mask=mask, other=0.0).to(tl.float32)
            after = before + tl.sigmoid(update - 1) * (tanh(tl.sigmoid(reset) * cand) - before)
            tl.store(deter + at, after, mask=mask)
    tl.debug_barrier()


@triton.jit
def next_stoch(
    stoch, logit, noise, room,
    S: tl.constexpr, K: tl.constexpr, PS: tl.constexpr, PK: tl.constexpr, unimix: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Draw the next stoch (M, S, K) from the prior's logits, for `room` sequences."""
    r, c = tl.arange(0, M * PS), tl.arange(0, PK)
    row, group = r // PS, r % PS
    real = (group < S) & (row < room)
    size = tl.zeros((M * PS,), tl.int32) + K
    inside = c[None, :] < size[:, None]
    at, mask = (row * S + group)[:, None] * K + c[None, :], real[:, None] & inside
    random = tl.load(noise + row * S + group, mask=real, other=0.0)
    index = draw(tl.load(logit + at, mask=mask, other=0.0).to(tl.float32), inside, size, random, unimix)
    tl.store(stoch + at, (c[None, :] == index[:, None]).to(tl.float32), mask=mask)
    tl.debug_barrier()


@triton.jit
def imagine_kernel(
    # states and actions of all steps, the first state given; noise
    deter, stoch, action, action_noise, noise,
    # where an action's parts are
    begins, sizes, drawn, numbers,
    # weights
    w_policy, b_policy, s_policy, w_policies, b_policies, s_policies, w_act, b_act,
    w_action, b_action, s_action, w_deter, b_deter, s_deter, w_stoch, b_stoch, s_stoch,
    w_hidden, b_hidden, s_hidden, w_gates, b_gates,
    w_prior, b_prior, s_prior, w_priors, b_priors, s_priors, w_logit, b_logit,
    # memory of a step
    one, other, out, taken, joint, hidden, logit,
    T, N,
    D: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    A: tl.constexpr, V: tl.constexpr, ON: tl.constexpr, POLICIES: tl.constexpr, PRIORS: tl.constexpr,
    PS: tl.constexpr, PK: tl.constexpr, PA: tl.constexpr, PV: tl.constexpr, PQ: tl.constexpr,
    low: tl.constexpr, high: tl.constexpr, unimix: tl.constexpr, act_unimix: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, eps: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Imagine from M start states."""
    SK: tl.constexpr = S * K
    WIDE: tl.constexpr = max(U, H)
    first = tl.program_id(0).to(tl.int64) * M
    room = N - first
    live = tl.arange(0, M) < room
    one, other, out, taken = one + first * WIDE, other + first * WIDE, out + first * 2 * A, taken + first * A
    joint, hidden, logit = joint + first * 3 * H, hidden + first * D, logit + first * SK
    for t in range(T):
        now = t * N + first
        d, s, next_d, next_s = deter + now * D, stoch + now * SK, deter + (now + N) * D, stoch + (now + N) * SK
        x = mlp(
            one, other, d, D, s, SK, w_policy, b_policy, s_policy, w_policies, b_policies, s_policies, U, POLICIES,
            live, M, C, eps, tile,
        )  # fmt: skip
        affine(out, 2 * A, x, U, U, x, U, 0, w_act, b_act, 2 * A, live, M, C, tile)
        choose(
            action + now * A, taken, out, action_noise + now * ON, begins, sizes, drawn, numbers, room,
            A, V, ON, PA, PV, PQ, low, high, act_unimix, M,
        )  # fmt: skip
        next_deter(
            next_d, d, s, taken, joint, hidden, w_action, b_action, s_action, w_deter, b_deter, s_deter,
            w_stoch, b_stoch, s_stoch, w_hidden, b_hidden, s_hidden, w_gates, b_gates, live, A, D, G, H, SK,
            M, C, eps, tile,
        )  # fmt: skip
        x = mlp(
            one, other, next_d, D, next_d, 0, w_prior, b_prior, s_prior, w_priors, b_priors, s_priors, H, PRIORS,
            live, M, C, eps, tile,
        )  # fmt: skip
        affine(logit, SK, x, H, H, x, H, 0, w_logit, b_logit, SK, live, M, C, tile)
        next_stoch(next_s, logit, noise + now * S, room, S, K, PS, PK, unimix, M)


def constants(rssm, actor):
    """Return the constants of the kernel by name, for a rssm.RSSM and an Actor."""
    (S, K), spec, config = rssm.latent.shape, actor.spec, actor.heads[0].config
    classes = [size for sizes in spec.classes.values() for size in sizes]
    layers = {"POLICIES": len(actor.mlp) // 2 - 1, "PRIORS": len(rssm.prior[0]) // 2 - 1}
    sizes = {"D": rssm.deter, "G": rssm.cell.blocks, "H": len(rssm.prior[0][1].scale), "S": S, "K": K}
    sizes |= {"U": len(actor.mlp[1].scale), "A": spec.size, "V": len(classes), "ON": sum(spec.variables.values())}
    padded = {"PS": S, "PK": K, "PA": spec.size, "PV": max(1, len(classes)), "PQ": max([1, *classes])}
    padded = {name: triton.next_power_of_2(size) for name, size in padded.items()}
    shares = {"low": config.min_std, "high": config.max_std, "unimix": rssm.latent.unimix, "act_unimix": config.unimix}
    return sizes | layers | padded | shares | {"M": ROWS, "C": COLUMNS, "eps": EPS, "tile": TILE}


class Imagine:
    """Rolls the prior forward by an actor's samples, as `RSSM.imagine` does.

    spec: ActionSpec. What the kernel is told of it goes to a device once: nothing may while a CUDA graph is recorded.
    """

    def __init__(self, spec):
        self.places = functools.cache(functools.partial(Places.of, spec))

    def __call__(self, rssm, actor, start, action_noise):
        """Imagine; arguments and results as of `imagine`."""
        return imagine(rssm, actor, start, action_noise, self.places(start.deter.device))


def imagine(rssm, actor, start, action_noise, places):
    """Compute all steps of a rollout in one kernel.

    Args:
      rssm: rssm.RSSM of a BlockGRU of one hidden layer and a OneHotLatent; actor: Actor of bounded normals.
      start: State (N, ...), in the dtype that is computed in.
      action_noise: (H, N, n), as of `actor.noise`; that of the prior is drawn here. places: Places.
    Returns: State (H + 1, N, ...) with the start first, actions (H, N, A) in float32.
    """
    deter, (T, N) = start.deter, action_noise.shape[:2]
    noise = rssm.latent.noise((T, N), deter.device)  # (H, N, S)
    c = constants(rssm, actor)
    states = start.map(lambda x: torch.cat([x[None], x.new_empty(T, *x.shape)]))
    actions = deter.new_empty(T, N, c["A"], dtype=torch.float32)
    wide = max(c["U"], c["H"])
    memory = [deter.new_empty(N, n) for n in (wide, wide, 2 * c["A"], c["A"], 3 * c["H"], c["D"], c["S"] * c["K"])]
    weights, given = Weights.of(rssm, actor, deter.dtype), [x.contiguous() for x in (action_noise, noise)]
    imagine_kernel[(triton.cdiv(N, ROWS),)](
        *states, actions, *given, *places, *weights, *memory, T, N, **c, num_warps=WARPS
    )
    return states, actions
