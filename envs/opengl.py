"""Drawing without a display: the choice of MuJoCo's renderer, and its orderly end."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import weakref
from ctypes.util import find_library
from types import ModuleType
from typing import Any

from envs.env import Env
from envs.errors import one_line
from tools import UserError

MUJOCO_DEVICE = "MUJOCO_EGL_DEVICE_ID"  # which of EGL's devices it draws on; the first that works if it is not set
NO_RENDERER = "dm_control finds no headless OpenGL: apt-get install libosmesa6 (or libegl1 libgl1)"


def import_suite() -> ModuleType:
    """Import `dm_control.suite`. Raises UserError where its renderer fails, ImportError where it is missing."""
    load_compiler_first()
    # Of its own models it says, for each that is loaded, what MuJoCo will not read one day.
    logging.getLogger("absl").addFilter(lambda record: "is deprecated and will be removed" not in record.getMessage())
    try:
        from dm_control import suite
    except ImportError:
        raise  # a missing package: whoever asked knows what to install
    except Exception as error:
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise UserError(f"dm_control cannot be imported (MUJOCO_GL is {backend}): {one_line(error)}") from error
    return suite


def load_compiler_first() -> None:
    """Load Triton's compiler, if it is installed, into a process that may compile: before anything that draws is.

    Mesa, which draws without a GPU, brings an LLVM of its own, as Triton does. Triton's ends with a segmentation fault
    where Mesa's was loaded before it; the other order works. A worker has no PyTorch, and needs nothing.
    """
    if "torch" in sys.modules:
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401


def close_before_exit(env: Env) -> None:
    """Free OpenGL contexts that nobody closed.

    With osmesa dm_control draws on a thread pool, which ends before the functions of `atexit` run; freeing
    then prints tracebacks. So this takes the hook of the pools themselves: last registered, first called.
    """
    import concurrent.futures.thread  # noqa: F401, registers the pools' own function, before ours

    close = weakref.WeakMethod(env.close)
    threading._register_atexit(lambda: close() and close()())


# ---------------------------------------------------------------------------
# MUJOCO_GL, which counts only before the import


def choose_renderer() -> bool:
    """Set MUJOCO_GL, unless the user has, to what works here. Return True if there is anything to draw with.

    It is set without an `image` as well, for videos of a proprioceptive agent, and because with the variable
    unset dm_control tries GLFW, which complains about a missing display.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return True
    for backend, works in (("egl", egl_works), ("osmesa", osmesa_works)):
        if works():
            os.environ["MUJOCO_GL"] = backend
            return True
    return False


def osmesa_works() -> bool:
    """True if OSMesa is installed."""
    return find_library("OSMesa") is not None


def egl_works() -> bool:
    """True if EGL opens a display on some device; its libraries may well be there without one."""
    return any(egl_displays())


def egl_displays() -> list[bool]:
    """Return for each of EGL's devices whether a display opens there."""
    load_compiler_first()
    name = find_library("EGL")
    if name is None or find_library("GL") is None:
        return []
    egl = ctypes.CDLL(name)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return []
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query = ctypes.CFUNCTYPE(integer, integer, pointer, pointer)(query)
    display_of = ctypes.CFUNCTYPE(pointer, integer, pointer, pointer)(display_of)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    devices, count = (pointer * 16)(), integer(0)
    query(16, devices, ctypes.byref(count))
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    displays = [display_of(platform_device, device, None) for device in devices[: count.value]]
    return [bool(display and egl.eglInitialize(display, None, None)) for display in displays]


def draw_beside(device: Any) -> None:
    """Let MuJoCo draw on the GPU that learns, where that is not the first, unless the user says which by its variable.

    EGL counts the machine's devices, whatever CUDA_VISIBLE_DEVICES hides from CUDA. For environments that are made
    afterwards, in processes of their own as well.

    device: torch device.
    """
    if device.type != "cuda" or MUJOCO_DEVICE in os.environ:
        return
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    number = names[device.index] if names and device.index < len(names) else str(device.index)
    if number.isdigit() and int(number) and True in egl_displays()[int(number) : int(number) + 1]:
        os.environ[MUJOCO_DEVICE] = number
