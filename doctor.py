"""Say what works on this machine, and end with a block to paste into an issue.

    python3 doctor.py                  # a few minutes; other flags are dreamer.py's, such as --device cuda:1

It tells versions, driver and devices; compares losses and gradients of an update as it is written with those of a
compiled one and of one that is recorded as a CUDA graph; times updates of size1m; and draws by EGL. What a machine
does not have is said to be not checked. Exit status 1 if something failed.
"""

import contextlib
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback

from training import commands, installed

if __name__ == "__main__":
    installed.demand("doctor.py")  # before the first package is imported
    commands.answer("doctor.py", commands.of_doctor, __doc__)

import numpy as np
import torch

from agents import make_agent
from benchmarks import timing
from benchmarks.pages import processor
from envs import make_envs
from envs.opengl import draw_beside, egl_displays
from modalities import obs_spec
from ops.graphs import WARMUP
from ops.random import drawing_from
from replay.memory import memory_limit, size
from specs import act_spec
from tools import UserError, derive_seed, guard_output
from training import machine

PACKAGES = ("torch", "numpy", "gymnasium", "triton", "mujoco", "dm_control", "ale-py")
QUIET = {"logger": (), "script": "train", "eval_envs": 1}
BATCH, LENGTH, HORIZON = 2, 8, 3  # of what is compared: with few draws, that rounding turns none of them
TOLERANCE = 1e-3  # of a tensor's largest magnitude, in float32
DRAW = """
import time
from dm_control import suite
from OpenGL import GL
env = suite.load("walker", "walk")
env.reset()
env.physics.render(64, 64, camera_id=0)
start = time.perf_counter()
for _ in range(50):
    image = env.physics.render(64, 64, camera_id=0)
each = (time.perf_counter() - start) / 50
name = (GL.glGetString(GL.GL_RENDERER) or b"?").decode()
env.physics.free()
assert image.std() > 1, "the picture is empty"
print(f"{1e3 * each:.2f} ms for 64x64 pixels, {name}")
"""


class NotChecked(Exception):
    """Raised where a check lacks what it needs; the text says what."""


# ---------------------------------------------------------------------------
# What is told


def system(config):
    """Return the system, its processor and its memory."""
    threads = config.threads or torch.get_num_threads()
    python = f"Python {platform.python_version()}"
    return f"{python}, {platform.platform()}; {processor()}, {threads} threads, {size(memory_limit())} of memory"


def packages(config):
    """Return the versions of what counts here."""
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return f"{', '.join(found)}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def driver(config):
    """Return the first line of what the NVIDIA driver tells of itself."""
    try:
        return machine.DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):
        raise NotChecked("there is no NVIDIA driver on this machine") from None


def devices(config):
    """Return each CUDA device with its compute capability and memory."""
    if not torch.cuda.is_available():
        raise NotChecked(machine.unused_gpu() or "PyTorch sees no CUDA device")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = (f"{i} {c.name}, {c.major}.{c.minor}, {size(c.total_memory)}" for i, c in enumerate(cards))
    return f"{'; '.join(told)}; PyTorch has kernels for {' '.join(torch.cuda.get_arch_list())}"


def chosen(config):
    """Return the device and the compute dtype that a run would take."""
    device = machine.choose_device(config.device)
    return f"{device}, {str(machine.choose_dtype(config.precision, device)).removeprefix('torch.')}"


# ---------------------------------------------------------------------------
# What is compared


def sample(config):
    """Return specs of observations and actions, and random arrays {key: (B, T, ...)} of the task."""
    with contextlib.closing(make_envs(config, "train", 1)) as envs:
        spaces = envs.obs_space, envs.act_space
    specs = obs_spec(spaces[0]), act_spec(spaces[1])
    steps = timing.random_steps(spaces[0], specs[1], BATCH * LENGTH)
    return specs, {key: value.reshape(BATCH, LENGTH, *value.shape[1:]) for key, value in steps.items()}


def results(config, updates):
    """Return what comes of the last of some updates and of as many actions: {name: tensor}, losses and gradients."""
    specs, arrays = sample(config)
    agent = make_agent(config, *specs)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, 9))
    with torch.no_grad():  # away from the start, where outputs that begin at zero have few gradients
        for param in agent.nets.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=generator).to(param.device))
    batch, obs = agent.batch(arrays), {key: value[:, 0] for key, value in arrays.items()}
    carry = agent.initial(BATCH)
    for _ in range(updates):
        with drawing_from(agent.generators["learn"]):
            _, metrics = agent.update(*batch)
        actions, carry, _ = agent.act(obs, carry, "noisy")
    found = {name: value for name, value in metrics.items() if name.endswith("loss")}
    found |= {f"gradient of {name}": param.grad for name, param in agent.nets.named_parameters()}
    found |= {f"chosen {key}": torch.from_numpy(value) for key, value in actions.items()}
    return {name: value.detach().float().cpu().clone() for name, value in found.items() if value is not None}


def compared(config, updates=1, **changes):
    """Compare an update as it is written with one by other settings; return how much they differ.

    Raises ValueError if that is too much.
    """
    horizon = config.hierarchy.every if config.behavior == "hierarchical_ppo" else HORIZON  # it needs a multiple
    plain = config.replace(precision="32", imag_horizon=horizon, compile=False, graphs="false")
    machine.exact_products(True)
    written, other = results(plain, updates), results(plain.replace(**changes), updates)
    name, worst = difference(written, other)
    text = f"{len(written)} losses, gradients and actions differ by {worst:.1e} of their largest at most"
    if not worst <= TOLERANCE:
        raise ValueError(f"{text}, in {name}; allowed are {TOLERANCE:.0e}")
    return text


def difference(one, other):
    """Return the name of the tensor that differs most, relative to its largest magnitude, and by how much."""
    if one.keys() != other.keys():
        raise ValueError(f"one has no {', '.join(sorted(one.keys() ^ other.keys())[:3])}")
    worst = {
        name: float((other[name] - value).abs().max() / value.abs().max().clamp(min=1e-8))
        for name, value in one.items()
    }
    name = max(worst, key=lambda name: (np.isnan(worst[name]), worst[name]))
    return name, worst[name]


def eager(config):
    """Make an update as it is written, twice: the same comes of it, and it is finite."""
    text = compared(config)
    return f"an update is finite; of two, {text}"


def compiled(config):
    """Compare with a compiled update."""
    if not config.compile:
        raise NotChecked("--compile false")
    machine.check_compiler()
    return compared(config, compile=True)


def captured(config, compile=False):
    """Compare with an update that is recorded as a CUDA graph, and replayed."""
    if machine.choose_device(config.device).type != "cuda":
        raise NotChecked("CUDA graphs need a GPU, and this is the CPU")
    if config.graphs == "false" or (compile and not config.compile):
        raise NotChecked("--graphs false" if config.graphs == "false" else "--compile false")
    return compared(config, WARMUP + 2, graphs="true", compile=compile)


def both(config):
    """Compare with an update that is compiled and recorded: what a run takes on a GPU."""
    return captured(config, compile=True)


def in_triton(config):
    """Compare with an update whose posterior is computed by Triton's kernels."""
    if machine.choose_device(config.device).type != "cuda":
        raise NotChecked("Triton's kernels need a GPU, and this is the CPU")
    return compared(config, **{"ops.scan": "triton"})


# ---------------------------------------------------------------------------
# What is timed


def speed(config, updates=20):
    """Time updates, acting and sampling, as a run would do them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        subject = timing.Subject(config.replace(threads=config.threads or timing.THREADS), folder)
        (result,), _ = timing.measure([subject], updates)
    ms, acts = result["ms_per_update"], [f"{each:.2f} ms for {n}" for n, each in result["act_ms"].items()]
    return (
        f"{result['parameters']:,} parameters, {result['batch_size']}x{result['batch_length']}, {result['precision']}, "
        f"compile {str(result['compile']).lower()}, graphs {str(result['graphs']).lower()}: "
        f"{ms['median']:.2f} ms an update ({ms['min']:.2f} to {ms['max']:.2f}), {result['flops'] / 1e9:.1f} GFLOP, "
        f"{result['mfu']:.3f} of a peak of {result['peak_gflops']:.0f} GFLOP/s, {result['peak_memory_mb']:.0f} MB; the "
        f"first {timing.WARMUP} took {result['compile_s']:.0f} s longer; sampling {result['sample_ms']:.2f} ms, "
        f"storing {result['refresh_ms']:.2f} ms, acting {', '.join(acts)}"
    )


def drawing(config):
    """Draw MuJoCo's pictures by EGL, in a process of its own."""
    if not any(egl_displays()):
        raise NotChecked("EGL is not installed (apt-get install libegl1 libgl1), or opens no display on any device")
    try:
        importlib.metadata.version("dm_control")
    except importlib.metadata.PackageNotFoundError:
        raise NotChecked("dm_control is not installed: pip install -r requirements/dmc.txt") from None
    draw_beside(machine.choose_device(config.device))
    command, environ = [sys.executable, "-c", DRAW], {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return done.stdout.strip()


CHECKS = {
    "system": system,
    "packages": packages,
    "driver": driver,
    "GPUs": devices,
    "device": chosen,
    "as written": eager,
    "compiled": compiled,
    "captured": captured,
    "compiled and captured": both,
    "by --ops.scan triton": in_triton,
    "speed": speed,
    "EGL": drawing,
}


# ---------------------------------------------------------------------------
# The command


def examine(config, say):
    """Make all checks; `say` gets a line of each. Return the lines, and the tracebacks of those that failed."""
    lines, traces = [], []
    for name, check in CHECKS.items():
        try:
            verdict, text = "ok", check(config)
        except NotChecked as reason:
            verdict, text = "not checked", reason
        except Exception as error:
            verdict, text = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            if not isinstance(error, UserError):
                traces.append("".join(traceback.format_exception(error, limit=-6)).strip())
        lines.append(f"{verdict:12} {name}: {without_home(str(text))}")
        say(lines[-1])
    return lines, [without_home(trace) for trace in traces]


def without_home(text):
    """Return a text in which the user's home is ~, as it is to be shown to others."""
    home = re.escape(os.path.expanduser("~"))
    return text if home == "/" else re.sub(rf"{home}(?=/)", "~", text)


def main(argv=None):
    """Run the command line; return the exit status."""
    try:
        words, config = commands.of_doctor(sys.argv[1:] if argv is None else argv, __doc__)
        config = config.replace(**QUIET)
        machine.prepare(config)
    except UserError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    lines, traces = examine(config, lambda line: print(line, flush=True))
    flags = f"doctor.py {' '.join(words)}".strip()
    block = itertools.chain(["```", flags], lines, *([trace, ""] for trace in traces), ["```"])
    print("\nPaste what follows into an issue, with what you expected:\n", *block, sep="\n", flush=True)
    return 1 if any(line.startswith("FAILED") for line in lines) else 0


if __name__ == "__main__":
    guard_output()
    sys.exit(main())
