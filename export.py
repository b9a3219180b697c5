"""Take a trained agent elsewhere: its acting step as one file, with a description of what goes in and comes out.

    python3 export.py --checkpoint logdir/run --format onnx

writes agent.onnx (for ONNX Runtime) or agent.pt2 (for `torch.export.load`) and agent.json to logdir/run/export/.
docs/export.md has a loop that runs it.
"""

import importlib.metadata
import json
import logging
import pathlib
import statistics
import sys
import tempfile
import time
import warnings

from training import commands, installed

if __name__ == "__main__":
    installed.demand("export.py")  # before the first package is imported
    commands.answer("export.py", commands.of_export, __doc__)

import numpy as np
import torch

from agents.acting import ActingStep, make_decoder
from agents.policy import load_policy
from tools import UserError, atomic_write
from training.commands import SUFFIX

INSTALL = "pip install -r requirements/export.txt"
CHECKED, TIMED = 50, 200  # steps that are compared with PyTorch's, and timed
TOLERANCE = 1e-4
COUNT = 2  # environments of an example: PyTorch takes a batch of 1 for no axis that may vary


def main(argv=None):
    """Run the command line; return the exit status."""
    try:
        options = commands.of_export(sys.argv[1:] if argv is None else argv, __doc__)
        export(options)
    except UserError as error:
        print(f"export.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def export(options):
    """Write the acting step of a checkpoint and its description, and say how it does."""
    if options.format == "onnx":
        check_packages()
    policy = load_policy(options.checkpoint, "cpu", precision="32")
    native = policy.converter and policy.converter.native
    spec = policy.act_spec
    step = ActingStep(policy.agent, options.mode, {key: make_decoder(spec, key, native) for key in spec.widths}).eval()
    folder = options.out or policy.path.parent / "export"
    folder = folder.expanduser()
    path = folder / SUFFIX[options.format]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:  # whole or not at all
            made = pathlib.Path(scratch) / path.name
            WRITERS[options.format](step, options.batch, made)
            run = RUNNERS[options.format](made)
            apart, milliseconds = check(step, run, COUNT if options.batch == "any" else options.batch)
            made.replace(path)
        about = describe(step, policy, options) | {"latency_ms": milliseconds, "largest_difference": apart}
        text = json.dumps(about, indent=2, allow_nan=False) + "\n"
        atomic_write(folder / "agent.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {about['parameters']:,} parameters, interface in agent.json")
    who = "ONNX Runtime" if options.format == "onnx" else "torch.export"
    print(f"a step takes {milliseconds:.2f} ms in {who} on one CPU thread (median of {TIMED})")
    print(f"over {CHECKED} steps it differs from PyTorch by {apart:.1e} at most")


def check_packages():
    """Raise UserError if a package is missing that writes, or reads, an ONNX file."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx needs a package ({error}): {INSTALL}, or take --format torch") from None


# ---------------------------------------------------------------------------
# Writing the file


def trace(step, count):
    """Return inputs and the torch.export program of a step, for a number of environments or any."""
    inputs = example(step, COUNT if count == "any" else count)
    axes = {f"noise.{index}": axis for index, (_, _, axis) in enumerate(step.draws)}
    free = torch.export.Dim("N")
    shapes = ({name: {axes.get(name, 0): free} for name in inputs},) if count == "any" else None
    with torch.no_grad():
        return inputs, torch.export.export(step, (inputs,), dynamic_shapes=shapes, strict=False)


def example(step, count, generator=None):
    """Return inputs of a step, all noise included."""
    return step.start(count) | step.noise(count, generator)


def write_torch(step, count, path):
    """Write a step for `torch.export.load`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(trace(step, count)[1], path)


def write_onnx(step, count, path):
    """Write a step as an ONNX file, whose names are those of the step's inputs and outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs, program = trace(step, count)
        program = program.run_decompositions(DECOMPOSED)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
        made = torch.onnx.export(program, (inputs,), dynamo=True, verbose=False)
    graph = made.model.graph
    for names, values in ((inputs, graph.inputs), (step.outputs, graph.outputs)):
        for name, value in zip(names, values, strict=True):
            value.name = name
    made.save(path)


WRITERS = {"onnx": write_onnx, "torch": write_torch}


def ndtr(x):
    """Return the normal distribution function, which ONNX lacks, by a rational Chebyshev fit of erfc that keeps seven
    digits even where it is tiny (Numerical Recipes, erfcc)."""
    z = x.abs() / 2**0.5
    t = 1 / (1 + 0.5 * z)
    terms = (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587)
    exponent = polynomial(t, (*terms, -0.82215223, 0.17087277))
    tail = 0.5 * t * torch.exp(exponent - z * z)
    return torch.where(x < 0, tail, 1 - tail)


def ndtri(p):
    """Return the inverse of `ndtr`, by P. J. Acklam's rational approximations and a step of Newton's method."""
    q, low = p - 0.5, torch.minimum(p, 1 - p)
    r, s = q * q, torch.sqrt(-2 * torch.log(low))
    a = (2.506628277459239, -30.66479806614716, 138.3577518672690, -275.9285104469687, 220.9460984245205)
    b = (1.0, -13.28068155288572, 66.80131188771972, -155.6989798598866, 161.5858368580409, -54.47609879822406)
    c = (2.938163982698783, 4.374664141464968, -2.549732539343734, -2.400758277161838, -0.3223964580411365)
    d = (1.0, 3.754408661907416, 2.445134137142996, 0.3224671290700398, 0.007784695709041462)
    middle = q * polynomial(r, (*a, -39.69683028665376)) / polynomial(r, b)
    tail = polynomial(s, (*c, -0.007784894002430293)) / polynomial(s, d)
    x = torch.where(low < 0.02425, torch.where(q < 0, tail, -tail), middle)
    return x - (ndtr(-x.abs()) - low) * torch.sign(-q) * (2 * torch.pi) ** 0.5 * torch.exp(x * x / 2)


def polynomial(x, terms):
    """Return terms[0] + terms[1] x + terms[2] x^2 ..."""
    value = terms[-1]
    for term in terms[-2::-1]:
        value = value * x + term
    return value


DECOMPOSED = {torch.ops.aten.special_ndtr.default: ndtr, torch.ops.aten.special_ndtri.default: ndtri}


# ---------------------------------------------------------------------------
# Reading it back


def onnx_runner(path):
    """Return the function {name: tensor} -> {name: tensor} of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]

    def run(inputs):
        arrays = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))

    return run


RUNNERS = {"onnx": onnx_runner, "torch": lambda path: torch.export.load(path).module()}


def check(step, run, count):
    """Compare a file's step with PyTorch's on random observations, and time it.

    Returns: the largest difference, the median milliseconds of a step. Raises UserError if they are not the same.
    """
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    carry, apart, times = step.start(count), [], []
    for index in range(TIMED):
        inputs = carry | random_obs(step, count, generator) | step.noise(count, generator)
        inputs["is_first"] = torch.full((count,), index % 20 == 0)
        start = time.perf_counter()
        theirs = run(inputs)
        times.append(1000 * (time.perf_counter() - start))
        if index < CHECKED:
            with torch.no_grad():
                ours = step(inputs)
            apart.append(max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours))
            carry = carry | step.carry_of(ours)
    if not np.quantile(apart, 0.9) < TOLERANCE:  # one in ten may have drawn a number that lies between two choices
        raise UserError(f"the step as a file differs from PyTorch's by {max(apart):.1e}: nothing is written")
    return max(apart), statistics.median(times)


def random_obs(step, count, generator):
    """Return random observations {name: tensor}."""
    obs = {}
    for key, seen in step.agent.obs_spec.items():
        name = f"obs.{key}"
        like = step.start(count)[name]
        if seen.kind == "image":
            obs[name] = torch.randint(256, like.shape, generator=generator).to(like.dtype)
        elif seen.classes:
            drawn = torch.rand(count, len(seen.classes), generator=generator) * torch.tensor(seen.classes)
            obs[name] = drawn.to(like.dtype).view(like.shape)
        else:
            obs[name] = torch.randn(like.shape, generator=generator)
    return obs


# ---------------------------------------------------------------------------
# Its description


def describe(step, policy, options):
    """Return what agent.json holds: all that a program needs to know that runs the file without this project."""
    agent, config = step.agent, policy.config
    first, second = example(step, 1), example(step, COUNT)
    count = "N" if options.batch == "any" else options.batch

    def tensor(name):
        sizes = zip(first[name].shape, second[name].shape, strict=True)
        return {"name": name, "shape": [count if a != b else a for a, b in sizes], "dtype": dtype_of(first[name])}

    obs = {key: tensor(f"obs.{key}") | observation(key, policy) for key in agent.obs_spec}
    with torch.no_grad():
        outs = step(first)
    actions = {key: action(outs[f"action.{key}"], key, policy, count) for key in agent.act_spec.widths}
    carry = [
        {**tensor(name), "next": step.next_of(name), "initial": uniform(first[name][0].tolist())}
        for name in step.carried
    ]
    noise = [
        {**tensor(f"noise.{index}"), "distribution": DISTRIBUTIONS[kind]}
        for index, (kind, _, _) in enumerate(step.draws if options.mode == "sample" else ())
    ]
    first_of_episode = "true where an episode starts: the carry then counts for nothing. False everywhere else"
    return {
        "format": options.format,
        "file": SUFFIX[options.format],
        "mode": options.mode,
        "batch": options.batch,
        "task": config.task,
        "agent": config.behavior,
        "checkpoint": str(policy.path),
        "agent_steps": policy.steps,
        "parameters": sum(param.numel() for param in step.parts.parameters()),
        "observations": obs,
        "is_first": {**tensor("is_first"), "meaning": first_of_episode},
        "carry": carry,
        "noise": noise,
        "actions": actions,
        "action_repeat": config.action_repeat,
        "versions": {"torch": torch.__version__, **versions(options.format)},
    }


DISTRIBUTIONS = {"uniform": "uniform in [0, 1)", "normal": "standard normal"}


def observation(key, policy):
    """Say what the numbers of an observation mean, and how they come of what the environment gives."""
    seen, own = policy.obs_spec[key], (policy.own or {}).get("observation", {}).get(key)
    about = {"kind": seen.kind, "own": finite(own)}
    if seen.kind == "image":
        frames = policy.config.frame_stack
        layout = "height, width, channels; 0 to 255"
        layout += f"; the last {frames} frames along the channels, the oldest first" if frames > 1 else ""
        resized = own and list(seen.shape[:2]) not in (own["shape"][:2], own["shape"][1:])
        return about | {"layout": layout + ("; resized by averaging areas" if resized else "")}
    if seen.kind == "text":
        return about | text(seen, policy.config.text, own)
    if seen.kind == "audio":
        return about | {"low": -1, "high": 1, "layout": f"samples, channels; {heard(own)}; 0 is silence"}
    if seen.classes:
        return about | {"low": 0, "high": [size - 1 for size in seen.classes], "layout": "integers from 0 on, flat"}
    return about | {"low": None, "high": None, "layout": "numbers as the environment gives them, flat"}


def heard(own):
    """Say how the numbers of a sound come of what the environment gives."""
    if own and own["dtype"] == "uint8":
        return "(byte - 128) / 128"
    return "as the environment gives them, divided by the larger of its space's bounds if these are finite"


def text(seen, config, own):
    """Say what the token ids of a text are."""
    if own and own["kind"] != "Text":
        return {"low": 2, "high": seen.classes[0] - 1, "layout": "token ids: byte + 2, each of the environment's"}
    words = f"index in the sentences of {config.embeddings} + 2, one for a text" if config.embeddings else ""
    words = f"id of {config.tokenizer} + 2" if config.tokenizer else words or "byte of UTF-8 + 2"
    return {"low": 0, "high": seen.classes[0] - 1, "layout": f"token ids: {words}; 1 ends a text, 0 behind it"}


def action(value, key, policy, count):
    """Say what an action is."""
    about = {"name": f"action.{key}", "shape": [count, *value.shape[1:]], "dtype": dtype_of(value)}
    if policy.own:
        return about | {"meaning": "what the environment takes", "own": finite(policy.own["action"][key])}
    if key in policy.act_spec.classes:
        return about | {"meaning": "one-hots side by side", "classes": policy.act_spec.classes[key]}
    return about | {"meaning": "numbers in [-1, 1]", "low": -1, "high": 1}


def dtype_of(tensor):
    """Return the name of a tensor's dtype, as NumPy has it."""
    return str(tensor.dtype).removeprefix("torch.")


def uniform(tree):
    """Return nested lists as one number where all numbers in them are the same."""
    flat = np.unique(tree)
    return flat.item() if len(flat) == 1 else tree


def finite(tree):
    """Return nested data with None in place of numbers that JSON does not know: no bound."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not np.isfinite(tree) else tree


def versions(form):
    """Return {package: version} of what wrote a file beside PyTorch."""
    names = ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ()
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
