"""The gradients of the posterior's recurrence: one Triton kernel for those of all steps.

Letters as in `ops.kernels.observe`.
"""

import triton
import triton.language as tl

from ops.kernels.parts import fetch, norm_silu_gradient, probabilities, pull, pull_by_blocks, pull_shared, put, tanh


@triton.jit
def gradient_of_posterior(
    back_deter, back_stoch, back_post, on_logit, on_post, grad_deter, grad_stoch, grad_logit,
    logit, pre_post, w_post, s_post, w_logit,
    D: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PS: tl.constexpr, PK: tl.constexpr, PSK: tl.constexpr,
    unimix: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Go from the gradients of deter, stoch and logits to that of deter alone; return that of the norm's scale."""
    groups, classes = tl.arange(0, PS), tl.arange(0, PK)
    inside = (groups[:, None] < S) & (classes[None, :] < K)
    places = groups[:, None] * K + classes[None, :]
    on = tl.load(back_stoch + places, mask=inside, other=0.0)
    on = (1 - unimix) * (on + tl.load(grad_stoch + places, mask=inside, other=0.0).to(tl.float32))
    shares = probabilities(tl.load(logit + places, mask=inside, other=0.0).to(tl.float32), inside)
    on = shares * (on - tl.sum(on * shares, 1)[:, None])
    on += tl.load(grad_logit + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(on_logit + places, on, mask=inside)
    put(back_post, tl.zeros((PH,), tl.float32), H, PH)
    put(back_deter, fetch(back_deter, D, PD) + fetch(grad_deter, D, PD), D, PD)
    tl.debug_barrier()
    pull(fetch(on_logit, S * K, PSK), w_logit, back_post, H, S * K, PSK, span)
    on_pre, on_scale = norm_silu_gradient(fetch(back_post, H, PH), fetch(pre_post, H, PH), fetch(s_post, H, PH), H, eps)
    put(on_post, on_pre, H, PH)
    pull(on_pre, w_post, back_deter, D, H, PH, span)
    return on_scale


@triton.jit
def gradient_of_gates(
    back_deter, back_hidden, on_gates, gates, old_deter, w_gates,
    D: tl.constexpr, G: tl.constexpr, PD: tl.constexpr, P3W: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Go from the gradient of deter to those of the old deter and of the hidden layer."""
    W: tl.constexpr = D // G
    put(back_hidden, tl.zeros((PD,), tl.float32), D, PD)
    tl.debug_barrier()
    j = tl.arange(0, PD)
    at, inside = (j // W) * 3 * W + j % W, j < D  # gates of a block stand together
    reset = tl.sigmoid(tl.load(gates + at, mask=inside, other=0.0).to(tl.float32))
    cand = tl.load(gates + W + at, mask=inside, other=0.0).to(tl.float32)
    update = tl.sigmoid(tl.load(gates + 2 * W + at, mask=inside, other=0.0).to(tl.float32) - 1)
    new, old, grad = tanh(reset * cand), fetch(old_deter, D, PD), fetch(back_deter, D, PD)
    put(back_deter, grad * (1 - update), D, PD)
    inner = grad * update * (1 - new * new)
    tl.store(on_gates + at, inner * cand * reset * (1 - reset), mask=inside)
    tl.store(on_gates + W + at, inner * reset, mask=inside)
    tl.store(on_gates + 2 * W + at, grad * (new - old) * update * (1 - update), mask=inside)
    tl.debug_barrier()
    pull_by_blocks(on_gates, w_gates, 3 * W * W, back_hidden, D, W, 3 * W, P3W, span)


@triton.jit
def gradient_of_inputs(
    back_deter, back_stoch, back_hidden, on_hidden, on_joint, on_deter, on_stoch, pre_hidden, pre_deter, pre_stoch,
    w_hidden, s_hidden, w_deter, s_deter, w_stoch, s_stoch,
    D: tl.constexpr, H: tl.constexpr, SK: tl.constexpr, G: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PSK: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Go from the gradient of the hidden layer to those of the old deter and stoch; return those of three scales."""
    W: tl.constexpr = D // G
    on_pre, of_hidden = norm_silu_gradient(
        fetch(back_hidden, D, PD), fetch(pre_hidden, D, PD), fetch(s_hidden, D, PD), D, eps
    )
    put(on_hidden, on_pre, D, PD)
    put(back_stoch, tl.zeros((PSK,), tl.float32), SK, PSK)
    tl.debug_barrier()
    apart: tl.constexpr = (W + 3 * H) * W
    pull_by_blocks(on_hidden, w_hidden, apart, back_deter, D, W, W, PW, span)
    pull_shared(fetch(on_hidden, D, PD), w_hidden + W * W, apart, on_joint, 3 * H, D, W, PD, span)
    on_pre, of_deter = norm_silu_gradient(
        fetch(on_joint, H, PH), fetch(pre_deter, H, PH), fetch(s_deter, H, PH), H, eps
    )
    put(on_deter, on_pre, H, PH)
    pull(on_pre, w_deter, back_deter, D, H, PH, span)
    on_pre, of_stoch = norm_silu_gradient(
        fetch(on_joint + H, H, PH), fetch(pre_stoch, H, PH), fetch(s_stoch, H, PH), H, eps
    )
    put(on_stoch, on_pre, H, PH)
    pull(on_pre, w_stoch, back_stoch, SK, H, PH, span)
    return of_deter, of_stoch, of_hidden


@triton.jit
def gradient_kernel(
    # gradients of the results
    grad_deter, grad_stoch, grad_logit,
    # what was given and kept
    keep, w_deter, s_deter, w_stoch, s_stoch, w_hidden, s_hidden, w_gates, w_post, s_post, w_logit,
    logit, old_deter, pre_deter, pre_stoch, pre_hidden, gates, pre_post,
    # gradients: of what enters norms and gates, of logits, of norms' scales (B, ...); and memory of a step
    on_deter, on_stoch, on_joint, on_hidden, on_gates, on_post, on_logit,
    scale_deter, scale_stoch, scale_hidden, scale_post,
    back_deter, back_stoch, back_hidden, back_post,
    T,
    D: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    PD: tl.constexpr, PH: tl.constexpr, PS: tl.constexpr, PK: tl.constexpr, P3W: tl.constexpr, PW: tl.constexpr,
    PSK: tl.constexpr, unimix: tl.constexpr, eps: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Go back through one sequence; back_deter and back_stoch hold the gradients of the carried state."""
    SK: tl.constexpr = S * K
    b = tl.program_id(0)
    back_deter += b * D
    back_stoch += b * SK
    back_hidden += b * D
    back_post += b * H
    total_deter, total_stoch = tl.zeros((PH,), tl.float32), tl.zeros((PH,), tl.float32)
    total_hidden, total_post = tl.zeros((PD,), tl.float32), tl.zeros((PH,), tl.float32)
    for back in range(T):
        row = b * T + T - 1 - back
        total_post += gradient_of_posterior(
            back_deter, back_stoch, back_post, on_logit + row * SK, on_post + row * H,
            grad_deter + row * D, grad_stoch + row * SK, grad_logit + row * SK, logit + row * SK, pre_post + row * H,
            w_post, s_post, w_logit, D, H, S, K, PD, PH, PS, PK, PSK, unimix, eps, span,
        )  # fmt: skip
        gradient_of_gates(
            back_deter, back_hidden, on_gates + row * 3 * D, gates + row * 3 * D, old_deter + row * D, w_gates,
            D, G, PD, P3W, span,
        )  # fmt: skip
        of_deter, of_stoch, of_hidden = gradient_of_inputs(
            back_deter, back_stoch, back_hidden, on_hidden + row * D, on_joint + row * 3 * H, on_deter + row * H,
            on_stoch + row * H, pre_hidden + row * D, pre_deter + row * H, pre_stoch + row * H,
            w_hidden, s_hidden, w_deter, s_deter, w_stoch, s_stoch, D, H, SK, G, PD, PH, PW, PSK, eps, span,
        )  # fmt: skip
        total_deter += of_deter
        total_stoch += of_stoch
        total_hidden += of_hidden
        kept = tl.load(keep + row).to(tl.float32)
        put(back_deter, fetch(back_deter, D, PD) * kept, D, PD)
        put(back_stoch, fetch(back_stoch, SK, PSK) * kept, SK, PSK)
        tl.debug_barrier()
    put(scale_deter + b * H, total_deter, H, PH)
    put(scale_stoch + b * H, total_stoch, H, PH)
    put(scale_hidden + b * D, total_hidden, D, PD)
    put(scale_post + b * H, total_post, H, PH)
