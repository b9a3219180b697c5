"""Mathematics that the versions share: symlog, returns, and weights that hold something near its target."""

import torch


def symlog(x):
    """Return sign(x) log(1 + |x|), elementwise (DreamerV3, section "Robust predictions")."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x):
    """Invert `symlog`: sign(x) (exp|x| - 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def lambda_return(last, term, reward, boot, disc, lam):
    """Return the TD(lambda) returns of a sequence (DreamerV3, eq. 4, with resets).

        ret[t] = reward[t+1] + live[t+1] * ((1 - cont[t+1]) * boot[t+1] + cont[t+1] * ret[t+1])
        live = (1 - term) * disc,  cont = (1 - last) * lam,  ret[T-1] = boot[T-1]

    Args:
      last, term: (..., T) 1 where an episode ends for any reason / in a terminal state; fractions are allowed.
      reward, boot: (..., T) reward on arriving at t, value estimate of t.
      disc, lam: discount and lambda, floats.
    Returns: (..., T-1)
    """
    if not last.shape == term.shape == reward.shape == boot.shape:
        raise ValueError(f"shapes differ: {last.shape} {term.shape} {reward.shape} {boot.shape}")
    live = (1 - term.float())[..., 1:] * disc
    cont = (1 - last.float())[..., 1:] * lam
    base = reward[..., 1:] + live * (1 - cont) * boot[..., 1:]
    return discounted_sums(base, live * cont, boot[..., -1:])


def lambda_target(reward, value, disc, lam):
    """Return the TD(lambda) returns of a sequence in which a state's own reward is part of its value (Dreamer, V2).

        target[t] = reward[t] + disc[t] * ((1 - lam) * value[t+1] + lam * target[t+1]),  target[H] = value[H]

    Args:
      reward, value, disc: (H + 1, N) reward on arriving at t, value estimate of t, discount of what follows t.
      lam: float.
    Returns: (H, N)
    """
    base, decay = reward[:-1] + (1 - lam) * disc[:-1] * value[1:], lam * disc[:-1]  # (H, N)
    return discounted_sums(base.T, decay.T, value[-1:].T).T


def discounted_sums(base, decay, last):
    """Return x[t] = base[t] + decay[t] x[t + 1], where x[T] = last, by log2(T) operations on whole sequences.

    What x[t] is in terms of x[t + n] follows for twice the n from itself, n steps later (Hillis and Steele, 1986).

    Args:
      base, decay: (..., T); last: (..., 1).
    Returns: (..., T)
    """
    base, decay = torch.cat([base, last], -1), torch.cat([decay, torch.zeros_like(last)], -1)  # x[T] = last + 0
    n = 1
    while n < base.shape[-1]:
        here, later = slice(None, -n), slice(n, None)
        tails = base[..., -n:], decay[..., -n:]
        base, decay = (
            torch.addcmul(base[..., here], decay[..., here], base[..., later]),
            decay[..., here] * decay[..., later],
        )
        base, decay = (torch.cat(pair, -1) for pair in zip((base, decay), tails, strict=True))
        n *= 2
    return base[..., :-1]


def correction(seen, target, room=0.1, speed=0.1):
    """Return by what to multiply the weight of a loss that holds down what is `seen` (danijar/director, AutoAdapt).

    1 + speed where it is above its target by more than `room`, a share; 1 / (1 + speed) where it is below; else 1. For
    a loss that holds it up, change places.

    Args: tensors that broadcast, or one of them a number above 0.
    """
    up, down = seen > target * (1 + room), seen * (1 + room) < target
    return torch.where(up, 1 + speed, torch.where(down, 1 / (1 + speed), 1.0))
