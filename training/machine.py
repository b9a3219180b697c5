"""What a run asks of the machine: device, compute dtype, compiler, CPU settings."""

import contextlib
import ctypes
import os
import pathlib
import shutil
import sysconfig

import torch

from tools import UserError


def prepare_cpu(threads):
    """Settings that CPU arithmetic is slow without; call before the first tensor operation.

    Denormal numbers are flushed to zero (threads inherit this from the one that starts them), and freed memory is kept
    for the next tensor rather than returned to the system, which would have to map it page by page again.

    Args:
      threads: CPU threads of tensor operations; 0 leaves the choice to PyTorch.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):  # C libraries other than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: least size of an allocation that is mapped by itself
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap that is given back


def choose_device(name):
    """auto, cpu, cuda or cuda:N -> torch.device. Raises UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(precision, device):
    """The compute dtype: bfloat16 for bf16, and for auto where the hardware has it."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def check_compiler():
    """Raises UserError if this machine lacks what torch.compile calls: a C++ compiler and Python's headers."""
    headers = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])) or not headers.exists():
        raise UserError(
            "--compile needs a C++ compiler and Python's headers: apt-get install g++ python3-dev, or --compile false"
        )
