"""The DeepMind Control Suite, from proprioception or from pixels."""

import ctypes
import os
import sys
import threading
import weakref
from ctypes.util import find_library

import numpy as np
from gymnasium import spaces

from envs.errors import one_line, unknown
from envs.wrappers import flags, is_kept
from tools import UserError

ALIASES = {"cup_catch": "ball_in_cup_catch"}
CAMERAS = {"quadruped": 2}  # the first does not follow the body
RENDER_SIZE = (256, 256)
SHADOW_SIZE = 512  # instead of 2048: frames take six tenths of the time
NO_RENDERER = "dm_control finds no headless OpenGL: apt-get install libosmesa6 (or libegl1 libgl1)"


def make(task: str, config, seed: int):
    """The suite's `domain_task`, such as `walker_walk`. Its `image` is drawn only if the encoder reads it.

    Raises: UserError for an unknown task or camera, or if pictures are wanted and OpenGL is missing.
    """
    image = is_kept(config.encoder, "image", image=True)
    if not _choose_renderer() and image:
        raise UserError(NO_RENDERER)
    suite = _import_suite()
    tasks = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
    task = ALIASES.get(task, task)
    if task not in tasks:
        raise unknown("dmc task", task, tasks)
    domain, name = tasks[task]
    env = suite.load(domain, name, task_kwargs={"random": seed})
    camera = CAMERAS.get(domain, 0) if config.camera == -1 else config.camera
    if not 0 <= camera < env.physics.model.ncam:
        raise UserError(f"dmc_{task} has cameras 0 to {env.physics.model.ncam - 1}, not {camera}")
    return DMC(env, config.action_repeat, camera, tuple(config.size) if image else None)


class DMC:
    """A dm_control environment. Its `image` is always offered, but there only if its `size` is given."""

    def __init__(self, env, repeat: int, camera: int, size=None):
        self._env = env
        self._repeat = repeat
        self._camera = camera
        self._size = size
        # Every frame is resolved from the whole offscreen buffer: the smallest that will do is the fastest
        # and gives the same pictures. A smaller map of shadows changes pixels by 0.03 of 255 on average.
        visual = env.physics.model.vis
        visual.global_.offheight, visual.global_.offwidth = size or RENDER_SIZE
        visual.quality.shadowsize = SHADOW_SIZE
        self.obs_space = {key: spaces.Box(-np.inf, np.inf, spec.shape) for key, spec in env.observation_spec().items()}
        self.obs_space["image"] = spaces.Box(0, 255, (*(size or RENDER_SIZE), 3), np.uint8)
        spec = env.action_spec()
        low, high = (np.broadcast_to(bound, spec.shape) for bound in (spec.minimum, spec.maximum))
        self.act_space = {"action": spaces.Box(low.astype(np.float32), high.astype(np.float32))}
        _close_before_exit(self)

    def reset(self):
        return self._observe(self._env.reset(), 0.0)

    def step(self, action):
        reward = 0.0
        for _ in range(self._repeat):
            timestep = self._env.step(action["action"])
            reward += timestep.reward
            if timestep.last():
                break
        return self._observe(timestep, reward)

    def render(self, size=None):
        size = tuple(size or RENDER_SIZE)
        self._enlarge_buffer(size)
        return self._draw(size)

    def close(self):
        if self._env is not None:
            self._env.physics.free()
            self._env.close()
        self._env = None

    def _observe(self, timestep, reward):
        # dm_control says by the discount of the last step whether a state is terminal or time ran out.
        terminal = timestep.last() and timestep.discount == 0
        obs = {**timestep.observation, **flags(reward, timestep.first(), timestep.last(), terminal)}
        if self._size:
            obs["image"] = self._draw(self._size)
        return obs

    def _enlarge_buffer(self, size):
        physics = self._env.physics
        view = physics.model.vis.global_
        if size[0] > view.offheight or size[1] > view.offwidth:
            view.offheight, view.offwidth = np.maximum(size, (view.offheight, view.offwidth))
            if physics._contexts:  # of the old size; the next frame makes new ones
                physics._free_rendering_contexts()

    def _draw(self, size):
        import mujoco

        try:
            image = self._env.physics.render(*size, camera_id=self._camera)
        except (mujoco.FatalError, RuntimeError) as error:
            backend = os.environ.get("MUJOCO_GL", "unset")
            raise UserError(f"dm_control cannot render (MUJOCO_GL is {backend}): {one_line(error)}") from error
        return np.ascontiguousarray(image)  # OpenGL's rows run upwards


def _import_suite():
    try:
        from dm_control import suite
    except ImportError:
        raise  # a missing package: whoever asked knows what to install
    except Exception as error:
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise UserError(f"dm_control cannot be imported (MUJOCO_GL is {backend}): {one_line(error)}") from error
    return suite


def _close_before_exit(env):
    """Free OpenGL contexts that nobody closed.

    With osmesa dm_control draws on a thread pool, which ends before the functions of `atexit` run; freeing
    then prints tracebacks. So this takes the hook of the pools themselves: last registered, first called.
    """
    close = weakref.WeakMethod(env.close)
    threading._register_atexit(lambda: close() and close()())


# ---------------------------------------------------------------------------
# MUJOCO_GL, which counts only before the import


def _choose_renderer():
    """Set MUJOCO_GL, unless the user has, to what works here. Returns whether there is anything to draw with.

    It is set without an `image` as well, for videos of a proprioceptive agent, and because with the variable
    unset dm_control tries GLFW, which complains about a missing display.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return True
    for backend, works in (("egl", _egl_works), ("osmesa", _osmesa_works)):
        if works():
            os.environ["MUJOCO_GL"] = backend
            return True
    return False


def _osmesa_works():
    return find_library("OSMesa") is not None


def _egl_works():
    """Whether EGL opens a display on some device; its libraries may well be there without one."""
    name = find_library("EGL")
    if name is None or find_library("GL") is None:
        return False
    egl = ctypes.CDLL(name)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    query = ctypes.CFUNCTYPE(integer, integer, pointer, pointer)(query)
    display_of = ctypes.CFUNCTYPE(pointer, integer, pointer, pointer)(display_of)
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    devices, count = (pointer * 16)(), integer(0)
    query(16, devices, ctypes.byref(count))
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    displays = [display_of(platform_device, device, None) for device in devices[: count.value]]
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
