"""Settings of the machine: device, compute dtype, compiler, CPU."""

import contextlib
import ctypes
import os
import pathlib
import shutil
import sysconfig
from typing import Any

import torch

from tools import UserError
from training.distributed import environment
from training.rng import seed_everything


def prepare(config: Any) -> torch.device:
    """Apply a configuration's settings to this process, seed it, and return the device."""
    prepare_cpu(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision != "32"
    seed_everything(config.seed)
    return choose_device(config.device)


def prepare_cpu(threads: int) -> None:
    """Apply settings without which CPU arithmetic is slow; call before the first tensor operation.

    Denormal numbers are flushed to zero (threads inherit this from the one that starts them), and freed memory is
    reused for the next tensor rather than returned to the system, which would have to map it page by page again.

    Args:
      threads: CPU threads of tensor operations; 0 leaves the choice to PyTorch.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):  # C libraries other than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smallest allocation that gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap above which it is returned


def choose_device(name: str) -> torch.device:
    """Return the torch.device of auto, cpu, cuda or cuda:N, made the current one. Raises UserError if there is none.

    Of several processes that torchrun has started on a machine, each takes the CUDA device of its number there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type != "cuda":
        return device
    beside, local = environment("LOCAL_WORLD_SIZE", 1), environment("LOCAL_RANK", 0)
    if beside > 1 and device.index is not None and found > 1:
        raise UserError(f"--device {name} would be that of all {beside} ranks of this machine: leave it at auto")
    index = device.index or (local if found > 1 else 0)  # a scheduler may show each process its own device alone
    if index >= found:
        ranks = f" and {beside} ranks" if beside > 1 else ""
        raise UserError(f"--device {name}: this machine has {found} CUDA devices{ranks}")
    torch.cuda.set_device(index)
    return torch.device(device.type, index)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype: bfloat16 for bf16, and for auto if the hardware supports it."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_compiler() -> None:
    """Raise UserError if this machine lacks what torch.compile needs: a C++ compiler and Python's headers."""
    headers = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])) or not headers.exists():
        raise UserError(
            "--compile needs a C++ compiler and Python's headers: apt-get install g++ python3-dev, or --compile false"
        )
