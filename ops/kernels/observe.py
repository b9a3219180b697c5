"""The recurrence of DreamerV3's posterior on a GPU: one Triton kernel for all steps, and one for their gradients.

A program computes one sequence and loops over time, as sequences do not depend on each other. What passes from one
product to the next goes through memory, where the backward pass finds it again. As in `ops.scan`, gradients of kernels
are computed afterwards, for all steps in one matrix product. `rssm.RSSM.observe_step` says what is computed.

Letters: B batch, T time, D deter, G blocks of W = D / G, H hidden, S groups x K classes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ops.kernels.gradient import gradient_kernel
from ops.kernels.parts import fetch, norm_silu, pair, probabilities, product, product_of_blocks, put, tanh
from ops.layers import EPS

# Numbers of a weight that a program reads together, and its warps: the fastest of six pairs on an H200, at size1m.
FORWARD = {"span": 4096, "num_warps": 4}
BACKWARD = {"span": 8192, "num_warps": 16}


class Weights(NamedTuple):
    """Of the layers of a step, in their order: kernels (in, out), of blocks (G, in, out), scales and biases.

    deter, stoch: layers of the cell's inputs; hidden: its block layer (G, W + 3 H, W); gates (G, W, 3 W); post: the
    posterior's first layer, as far as it sees deter; logit: its output.
    """

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
    post: torch.Tensor
    post_scale: torch.Tensor
    logit: torch.Tensor
    logit_bias: torch.Tensor

    @classmethod
    def of(cls, rssm):
        """Take them from a rssm.RSSM."""
        cell, ((first, norm), out) = rssm.cell, rssm.posterior
        inputs = (x for layer, norm in (cell.embed_deter, cell.embed_stoch) for x in (*pair(layer), norm.scale))
        hidden = *pair(cell.hidden[0]), cell.norms[0].scale
        return cls(*inputs, *hidden, *pair(cell.gates), first.kernel[: rssm.deter], norm.scale, *pair(out))


SCALES = {name for name in Weights._fields if name.endswith("_scale")}  # which stay in float32


@triton.jit
def step_of_cell(
    deter, old_deter, old_stoch, action, pre_deter, pre_stoch, joint, pre_hidden, hidden, gates,
    w_deter, b_deter, s_deter, w_stoch, b_stoch, s_stoch, w_hidden, b_hidden, s_hidden, w_gates, b_gates,
    D: tl.constexpr, H: tl.constexpr, SK: tl.constexpr, G: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Compute the next deter of a sequence: `rssm.BlockGRU.forward`."""
    W: tl.constexpr = D // G
    pre = product(old_deter, w_deter, D, H, PH, span) + fetch(b_deter, H, PH)
    put(pre_deter, pre, H, PH)
    put(joint, norm_silu(pre, fetch(s_deter, H, PH), H, eps), H, PH)
    pre = product(old_stoch, w_stoch, SK, H, PH, span) + fetch(b_stoch, H, PH)
    put(pre_stoch, pre, H, PH)
    put(joint + H, norm_silu(pre, fetch(s_stoch, H, PH), H, eps), H, PH)
    put(joint + 2 * H, fetch(action, H, PH), H, PH)
    tl.debug_barrier()
    apart: tl.constexpr = (W + 3 * H) * W
    pre = product_of_blocks(old_deter, W, w_hidden, apart, W, W, D, W, PD, span) + fetch(b_hidden, D, PD)
    pre += product_of_blocks(joint, 0, w_hidden + W * W, apart, W, 3 * H, D, W, PD, span)
    put(pre_hidden, pre, D, PD)
    tl.debug_barrier()
    put(hidden, norm_silu(fetch(pre_hidden, D, PD), fetch(s_hidden, D, PD), D, eps), D, PD)
    tl.debug_barrier()
    j = tl.arange(0, PD)
    at, inside = (j // W) * 3 * W + j % W, j < D  # gates of a block stand together
    reset = product_of_blocks(hidden, W, w_gates, 3 * W * W, 3 * W, W, D, W, PD, span)
    cand = product_of_blocks(hidden, W, w_gates + W, 3 * W * W, 3 * W, W, D, W, PD, span)
    update = product_of_blocks(hidden, W, w_gates + 2 * W, 3 * W * W, 3 * W, W, D, W, PD, span)
    reset += tl.load(b_gates + at, mask=inside, other=0.0).to(tl.float32)
    cand += tl.load(b_gates + W + at, mask=inside, other=0.0).to(tl.float32)
    update += tl.load(b_gates + 2 * W + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gates + at, reset, mask=inside)
    tl.store(gates + W + at, cand, mask=inside)
    tl.store(gates + 2 * W + at, update, mask=inside)
    old = fetch(old_deter, D, PD)
    put(deter, old + tl.sigmoid(update - 1) * (tanh(tl.sigmoid(reset) * cand) - old), D, PD)
    tl.debug_barrier()


@triton.jit
def step_of_posterior(
    stoch, logit, deter, embed, noise, pre_post, post, w_post, s_post, w_logit, b_logit,
    D: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PH: tl.constexpr, PS: tl.constexpr, PK: tl.constexpr, PSK: tl.constexpr,
    unimix: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Compute the posterior's logits of a sequence and draw from it."""
    pre = product(deter, w_post, D, H, PH, span) + fetch(embed, H, PH)
    put(pre_post, pre, H, PH)
    put(post, norm_silu(pre, fetch(s_post, H, PH), H, eps), H, PH)
    tl.debug_barrier()
    put(logit, product(post, w_logit, H, S * K, PSK, span) + fetch(b_logit, S * K, PSK), S * K, PSK)
    tl.debug_barrier()
    groups, classes = tl.arange(0, PS), tl.arange(0, PK)
    inside = (groups[:, None] < S) & (classes[None, :] < K)
    places = groups[:, None] * K + classes[None, :]
    out = tl.load(logit + places, mask=inside, other=0.0).to(tl.float32)
    probs = tl.where(inside, (1 - unimix) * probabilities(out, inside) + unimix / K, 0.0)
    drawn = tl.load(noise + groups, mask=groups < S, other=0.0).to(tl.float32)
    passed = (drawn[:, None] >= tl.cumsum(probs, 1)) & (classes[None, :] < K - 1)
    index = tl.sum(passed.to(tl.int32), 1)
    tl.store(stoch + places, (classes[None, :] == index[:, None]).to(tl.float32), mask=inside)
    tl.debug_barrier()


@triton.jit
def observe_kernel(
    # what is given
    start_deter, start_stoch, keep, action, embed, noise,
    # weights
    w_deter, b_deter, s_deter, w_stoch, b_stoch, s_stoch, w_hidden, b_hidden, s_hidden, w_gates, b_gates,
    w_post, s_post, w_logit, b_logit,
    # what is computed, and what is kept for the gradients
    deter, stoch, logit, old_deter, old_stoch, pre_deter, pre_stoch, joint, pre_hidden, hidden, gates, pre_post, post,
    T,
    D: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PS: tl.constexpr, PK: tl.constexpr, P3W: tl.constexpr, PW: tl.constexpr,
    PSK: tl.constexpr, unimix: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Filter one sequence."""
    SK: tl.constexpr = S * K
    b = tl.program_id(0)
    last_deter, last_stoch = start_deter + b * D, start_stoch + b * SK
    for t in range(T):
        row = b * T + t
        kept = tl.load(keep + row).to(tl.float32)
        put(old_deter + row * D, fetch(last_deter, D, PD) * kept, D, PD)
        put(old_stoch + row * SK, fetch(last_stoch, SK, PSK) * kept, SK, PSK)
        tl.debug_barrier()
        step_of_cell(
            deter + row * D, old_deter + row * D, old_stoch + row * SK, action + row * H, pre_deter + row * H,
            pre_stoch + row * H, joint + row * 3 * H, pre_hidden + row * D, hidden + row * D, gates + row * 3 * D,
            w_deter, b_deter, s_deter, w_stoch, b_stoch, s_stoch, w_hidden, b_hidden, s_hidden, w_gates, b_gates,
            D, H, SK, G, PD, PH, eps, span,
        )  # fmt: skip
        step_of_posterior(
            stoch + row * SK, logit + row * SK, deter + row * D, embed + row * H, noise + row * S,
            pre_post + row * H, post + row * H, w_post, s_post, w_logit, b_logit,
            D, H, S, K, PH, PS, PK, PSK, unimix, eps, span,
        )  # fmt: skip
        last_deter, last_stoch = deter + row * D, stoch + row * SK


class Observe(torch.autograd.Function):
    """The recurrence as one operation: arguments as of `observe`, but keep (B, T), and the Weights one by one."""

    @staticmethod
    def forward(ctx, deter, stoch, keep, action, embed, noise, unimix, *weights):
        (B, T), dtype, weights = keep.shape, action.dtype, Weights(*weights)
        sizes = constants(deter.shape[-1], action.shape[-1], *stoch.shape[-2:], len(weights.hidden), unimix)
        cast = Weights(*(w if name in SCALES else w.to(dtype) for name, w in weights._asdict().items()))
        cast = Weights(*(weight.contiguous() for weight in cast))
        D, H, SK = sizes["D"], sizes["H"], sizes["S"] * sizes["K"]
        widths = {"deter": D, "stoch": SK, "logit": SK, "old_deter": D, "old_stoch": SK, "pre_deter": H, "pre_stoch": H}
        widths |= {"joint": 3 * H, "pre_hidden": D, "hidden": D, "gates": 3 * D, "pre_post": H, "post": H}
        made = {name: action.new_empty(B, T, width) for name, width in widths.items()}
        given = [x.to(dtype).contiguous() for x in (deter, stoch, keep, action, embed)]
        observe_kernel[(B,)](*given, noise.contiguous(), *cast, *made.values(), T, **sizes, **FORWARD)
        ctx.save_for_backward(given[2], *cast, *made.values())
        ctx.made, ctx.sizes, ctx.dtypes = list(made), sizes, [weight.dtype for weight in weights]
        return made["deter"], made["stoch"].unflatten(-1, stoch.shape[-2:]), made["logit"]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_deter, grad_stoch, grad_logit):
        keep, *saved = ctx.saved_tensors
        count, sizes = len(Weights._fields), ctx.sizes
        weights, kept = Weights(*saved[:count]), dict(zip(ctx.made, saved[count:], strict=True))
        (B, T), D, H, SK = keep.shape, sizes["D"], sizes["H"], sizes["S"] * sizes["K"]
        on = {"deter": H, "stoch": H, "joint": 3 * H, "hidden": D, "gates": 3 * D, "post": H, "logit": SK}
        on = {name: torch.zeros(B, T, width, device=keep.device) for name, width in on.items()}
        scales = {"deter": H, "stoch": H, "hidden": D, "post": H}
        scales = {name: torch.zeros(B, width, device=keep.device) for name, width in scales.items()}
        back = [torch.zeros(B, width, device=keep.device) for width in (D, SK, D, H)]
        own = [getattr(weights, name) for name in Weights._fields if not name.endswith("_bias")]
        seen = [kept[x] for x in ("logit", "old_deter", "pre_deter", "pre_stoch", "pre_hidden", "gates", "pre_post")]
        grads = [grad.contiguous() for grad in (grad_deter, grad_stoch, grad_logit)]
        arrays = *grads, keep, *own, *seen, *on.values(), *scales.values(), *back
        gradient_kernel[(B,)](*arrays, T, **sizes, **BACKWARD)
        on = {name: x.to(keep.dtype) for name, x in on.items()}
        grads = gradients_of_weights({name: x.flatten(0, 1) for name, x in on.items()}, kept, scales, sizes["G"])
        grads = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, on["joint"][..., 2 * H :], on["post"], None, None, *grads


def constants(D, H, S, K, G, unimix):
    """Return the constants of both kernels by name."""
    padded = {"D": D, "H": H, "S": S, "K": K, "W": D // G, "3W": 3 * D // G, "SK": S * K}
    sizes = {f"P{name}": triton.next_power_of_2(size) for name, size in padded.items()}
    return {"D": D, "H": H, "S": S, "K": K, "G": G, "unimix": unimix, "eps": EPS} | sizes


def gradients_of_weights(on, kept, scales, blocks):
    """Return the Weights' gradients, each of a kernel in one product.

    Args:
      on: {name: gradient (B T, n) of what enters a norm, gates or the draw}; kept: {name: (B, T, n)} of the forward
        pass; scales: {name: gradient (B, n) of a norm's scale, a row for each sequence}; blocks: G.
    """
    x = {name: value.flatten(0, 1) for name, value in kept.items()}
    slices = {"old": x["old_deter"], "hidden": x["hidden"], "on": on["hidden"], "gates": on["gates"]}
    slices = {name: value.unflatten(-1, (blocks, -1)).transpose(0, 1) for name, value in slices.items()}  # (G, B T, .)
    joint = (x["joint"].T @ on["hidden"]).unflatten(1, (blocks, -1)).transpose(0, 1)  # (G, 3 H, W)
    return Weights(
        deter=x["old_deter"].T @ on["deter"],
        deter_bias=on["deter"].sum(0),
        deter_scale=scales["deter"].sum(0),
        stoch=x["old_stoch"].T @ on["stoch"],
        stoch_bias=on["stoch"].sum(0),
        stoch_scale=scales["stoch"].sum(0),
        hidden=torch.cat([torch.bmm(slices["old"].mT, slices["on"]), joint], 1),
        hidden_bias=on["hidden"].sum(0),
        hidden_scale=scales["hidden"].sum(0),
        gates=torch.bmm(slices["hidden"].mT, slices["gates"]),
        gates_bias=on["gates"].sum(0),
        post=x["deter"].T @ on["post"],
        post_scale=scales["post"].sum(0),
        logit=x["post"].T @ on["logit"],
        logit_bias=on["logit"].sum(0),
    )


def observe(rssm, start, keep, action, embed, noise):
    """Filter sequences as `rssm.observe_step` does, whose inputs that depend on neither deter nor stoch are prepared.

    Args:
      rssm: rssm.RSSM of a BlockGRU and a OneHotLatent, both with one hidden layer, that starts from zeros.
      start: deter (B, D) and stoch (B, S, K) before the first step; they get no gradient.
      keep: (B, T, 1), 0 where to start anew; action: prepared (B, T, H); embed: its share of the posterior's first
        layer, with the bias (B, T, H); noise: (B, T, S), uniform.
    Returns: deter (B, T, D), stoch (B, T, S, K), logits (B, T, S K), all in the dtype of `action`.
    """
    weights = Weights.of(rssm)
    return Observe.apply(*start, keep[..., 0], action, embed, noise, rssm.latent.unimix, *weights)
