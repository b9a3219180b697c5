"""What the processes (ranks) of a run compute together; with one process all of it is the identity and costs nothing.

Every rank must call the same functions in the same order. Results are equal on all ranks, bit for bit.
"""

import torch

from tools import peers

_count = 1  # of ranks
_rank = 0


def count():
    """Return the number of ranks."""
    return _count


def place():
    """Return (rank,), or () in the first rank: what tells the seeds of ranks apart, and leaves one process as it is."""
    return (_rank,) if _rank else ()


def average_(tensors):
    """Replace tensors of one dtype by their means over the ranks, in place, in one reduction of a flat buffer."""
    if _count == 1 or not tensors:
        return
    if len(tensors) == 1:
        _reduce_(tensors[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _reduce_(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def average_metrics(metrics):
    """Return the means of {name: 0-d tensor} over the ranks."""
    if _count == 1 or not metrics:
        return metrics
    values = torch.stack([value.detach().float() for value in metrics.values()])
    _reduce_(values)
    return dict(zip(metrics, values.unbind(), strict=True))


def mean(value):
    """Return the mean of a tensor over the ranks, elementwise.

    Each rank's gradient is that of its own value, which the mean of the ranks' gradients makes the mean's.
    """
    return value if _count == 1 else _Mean.apply(value)


def gather(value):
    """Return the values of all ranks (R n,), one behind the other, of a tensor of n elements; without gradient."""
    return value if _count == 1 else _gather(value)


def broadcast_(tensors):
    """Overwrite tensors by those of the first rank, in place."""
    if _count == 1:
        return
    from torch import distributed

    for tensor in tensors:
        with peers():
            distributed.broadcast(tensor, 0)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        total = value.detach().clone()
        _reduce_(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


def _reduce_(tensor):
    """Replace a tensor by its mean over the ranks."""
    from torch import distributed

    with peers():
        distributed.all_reduce(tensor)
    tensor.div_(_count)


def _gather(value):
    from torch import distributed

    value = value.detach().reshape(-1).contiguous()
    out = value.new_empty(_count * value.numel())
    with peers():
        distributed.all_gather(list(out.chunk(_count)), value)
    return out


def start(rank, count):
    """Compute with `count` ranks, of which this is number `rank`, in torch.distributed's default group from now on."""
    global _rank, _count, _reduce_, _gather
    _rank, _count = rank, count
    if count > 1:
        _reduce_, _gather = map(torch.compiler.disable, (_reduce_, _gather))  # which takes long to import
