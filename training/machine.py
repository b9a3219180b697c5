"""Settings of the machine: device, compute dtype, compiler, CPU."""

import contextlib
import ctypes
import os
import pathlib
import re
import shutil
import sysconfig
import warnings
from typing import Any

import torch

from tools import UserError
from training.console import warn_at
from training.distributed import environment
from training.rng import seed_everything

DRIVER = pathlib.Path("/proc/driver/nvidia/version")  # is there where an NVIDIA driver is


def prepare(config: Any) -> torch.device:
    """Apply a configuration's settings to this process, seed it, and return the device."""
    prepare_cpu(config.threads)
    exact_products(config.precision == "32")
    # What is fastest at a trial may differ from one process to the next, and not give the same sums twice.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    seed_everything(config.seed)
    device = choose_device(config.device)
    unused = config.device == "auto" and device.type == "cpu" and unused_gpu()
    if unused:
        warn_at(config.log_level, unused)
    return device


def exact_products(exact: bool) -> None:
    """Let a GPU multiply float32 as it is, or by tensor cores with the ten bits of TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact


def prepare_cpu(threads: int) -> None:
    """Apply settings without which CPU arithmetic is slow; call before the first tensor operation.

    Denormal numbers are flushed to zero (threads inherit this from the one that starts them), and freed memory is
    reused for the next tensor rather than returned to the system, which would have to map it page by page again. Large
    tensors are in pages of 2 MiB where Linux gives them.

    Args:
      threads: CPU threads of tensor operations; 0 leaves the choice to PyTorch.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # which PyTorch reads at its first large tensor
    with contextlib.suppress(OSError, AttributeError):  # C libraries other than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smallest allocation that gets its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap above which it is returned


def choose_device(name: str) -> torch.device:
    """Return the torch.device of auto, cpu, cuda or cuda:N, and make a CUDA device the current one.

    What does not name a device, such as a new stream and so a CUDA graph, is on the current one. Of several processes
    that torchrun has started on a machine, each takes the device of its number there. Raises UserError if there is no
    such device, or none that this PyTorch has kernels for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and too_old(torch.cuda.current_device()) is None else "cpu"
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type != "cuda":
        return device
    beside, local = environment("LOCAL_WORLD_SIZE", 1), environment("LOCAL_RANK", 0)
    if beside > 1 and device.index is not None and found > 1:
        raise UserError(f"--device {name} would be that of all {beside} ranks of this machine: leave it at auto")
    index = torch.cuda.current_device() if device.index is None and found and beside == 1 else device.index or 0
    if beside > 1 and found > 1:  # a scheduler may show each process its own device alone
        index = local
    if index >= found:
        why = unused_gpu() if not found else None
        ranks = f" and {beside} ranks" if beside > 1 else ""
        raise UserError(f"--device {name}: {why or f'this machine has {found} CUDA devices{ranks}'}")
    reason = too_old(index)
    if reason:
        raise UserError(f"--device {name}: {reason}")
    device = torch.device(device.type, index)
    torch.cuda.set_device(device)
    return device


def too_old(index: int) -> str | None:
    """Return why this PyTorch has no kernels for a CUDA device, by its number, or None."""
    known = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)]
    major, minor = torch.cuda.get_device_capability(index)
    if not known or 10 * major + minor >= min(known):
        return None
    lowest = f"{min(known) // 10}.{min(known) % 10}"
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and PyTorch {torch.__version__} "
        f"needs {lowest}: install a build for an older CUDA (pytorch.org), or take --device cpu"
    )


def unused_gpu() -> str | None:
    """Return what keeps PyTorch from the NVIDIA GPU of this machine, or None if there is none, or it was hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        found = re.search(r"(?:Kernel Module|for \w+)\s+([\d.]+)", DRIVER.read_text())
    except (OSError, ValueError):
        return None
    if torch.version.cuda is None:
        return f"the GPU is not used: PyTorch {torch.__version__} is a build without CUDA"
    if torch.cuda.is_available():
        return too_old(torch.cuda.current_device())
    driver = f"driver {found[1]}" if found else "the driver"
    need = f"PyTorch {torch.__version__} needs one for CUDA {torch.version.cuda}"
    return f"the GPU is not used: {driver} is too old ({need}), or no GPU is visible: see nvidia-smi"


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype: bfloat16 for bf16, and for auto if the hardware multiplies it.

    Older GPUs, up to compute capability 7.5, only emulate it.
    """
    if precision == "auto":
        if device.type == "cuda":
            with torch.cuda.device(device):  # the one that is asked about
                fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if fast else "32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def choose_graphs(graphs: str, device: torch.device) -> bool:
    """True if updates and acting are to be recorded as CUDA graphs: for auto, on every GPU.

    Raises UserError where they are asked for and there is no GPU.
    """
    if graphs == "true" and device.type != "cuda":
        raise UserError("--graphs true: CUDA graphs need a GPU, and this runs on the CPU; take --graphs auto")
    return graphs != "false" and device.type == "cuda"


def check_scan(scan: str, device: torch.device) -> None:
    """Raise UserError if Triton's kernels are asked for where they cannot run, but for Triton's own interpreter."""
    if scan == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--ops.scan triton: its kernels need a GPU, and this runs on the CPU; take --ops.scan loop")


def check_compiler() -> None:
    """Raise UserError if this machine lacks what torch.compile needs: a C++ compiler and Python's headers.

    Its advice to those who develop it, and to take TF32 where float32 was asked for, is not shown.
    """
    for advice in (r"\s*Online softmax is disabled", "TensorFloat32 tensor cores"):
        warnings.filterwarnings("ignore", advice)
    headers = pathlib.Path(sysconfig.get_path("include")) / "Python.h"
    if not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])) or not headers.exists():
        raise UserError(
            "--compile needs a C++ compiler and Python's headers: apt-get install g++ python3-dev, or --compile false"
        )
