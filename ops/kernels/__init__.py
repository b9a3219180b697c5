"""Triton's kernels behind `--ops.scan triton`: what they know of, and where they are."""

from ops.layers import DREAMERV3
from tools import UserError


def observing(config, style):
    """Return `ops.kernels.observe.observe` for a configuration's section `rssm` and a Style.

    Raises UserError where it does not know them, or triton is missing.
    """
    known = {"cell": "block_gru", "latent": "onehot", "dyn_layers": 1, "obs_layers": 1, "initial": "zeros"}
    other = [f"--rssm.{key} {getattr(config, key)}" for key, value in known.items() if getattr(config, key) != value]
    other += [
        f"--{key} {getattr(style, key)}" for key in ("norm", "act") if getattr(style, key) != getattr(DREAMERV3, key)
    ]
    refuse(other)
    try:
        from ops.kernels import observe
    except ImportError:
        raise UserError("--ops.scan triton: triton is missing, which comes with PyTorch for CUDA") from None
    return observe.observe


def imagining(config, spec):
    """Return an `ops.kernels.imagine.Imagine` for a whole configuration and an ActionSpec, after `observing`.

    Raises UserError where it does not know the actor.
    """
    continuous = set(spec.widths) - set(spec.classes)
    dist = [f"--actor.dist {config.actor.dist}"] if continuous and config.actor.dist != "bounded_normal" else []
    sizes = {"--actor.layers": config.actor.layers, "--rssm.img_layers": config.rssm.img_layers}
    refuse(dist + [f"{flag} {layers}" for flag, layers in sizes.items() if not layers])
    from ops.kernels import imagine

    return imagine.Imagine(spec)


def refuse(other):
    """Raise UserError if there are flags that the kernels do not know."""
    if other:
        raise UserError(f"--ops.scan triton: its kernels do not know {', '.join(other)}; take --ops.scan loop")
