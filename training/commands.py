"""The command lines of export.py, inference_video.py and doctor.py, read before PyTorch is imported.

So that --help and a mistake are answered at once: PyTorch takes seconds to import, which they need not wait for.
"""

from __future__ import annotations

import argparse
import difflib
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from tools import Parser, UserError
from training.helptext import WIDTH

SUFFIX = {"onnx": "agent.onnx", "torch": "agent.pt2"}
FORMATS = {"mp4": ["mp4"], "gif": ["gif"], "both": ["mp4", "gif"]}
CHECKED = ("--configs", "size1m", "--task", "dummy_vector", "--log_level", "error")  # by the doctor, unless others are


def answer(program: str, read: Callable[[Sequence[str], str], Any], about: str) -> None:
    """End the process if its command line asks for help, or holds a mistake.

    program: what the user started; read: one of the functions below; about: the program's docstring.
    """
    try:
        read(sys.argv[1:], about)
    except UserError as error:
        sys.stderr.write(f"{program}: {' '.join(str(error).split())}\n")
        sys.exit(2)


def of_export(argv: Sequence[str], about: str) -> argparse.Namespace:
    """Read the command line of export.py; about: its docstring. Raises UserError."""
    parser = _parser("export.py", about)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a checkpoint or its logdir")
    add("--format", choices=SUFFIX, default="onnx", help="of the file (onnx)")
    add("--out", type=pathlib.Path, help="folder for what is written (export/ beside the checkpoint)")
    mode = "the latent's and the policy's modes, or samples of both, whose noise becomes an input (mode)"
    add("--mode", choices=["mode", "sample"], default="mode", help=mode)
    add(
        "--batch",
        type=batch,
        default="1",
        metavar="N|any",
        help="environments of a call; any takes longer to write (1)",
    )
    options = parser.parse_args(argv)
    _expect([options.checkpoint], "file")
    return options


def of_film(argv: Sequence[str], about: str) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line of inference_video.py; about: its docstring. Raises UserError.

    Returns: its own options, and the words left for dreamer.py's configuration.
    """
    parser = _parser("inference_video.py", about)
    add = parser.add_argument
    add("--checkpoint", nargs="+", default=["none"], help="checkpoints or logdirs; none is the random agent")
    add("--use-random-agent", action="store_true", help="let none act at random; without a checkpoint give --task")
    add("--episodes", type=positive(int), default=5, help="episodes of each agent (5)")
    add("--output", type=pathlib.Path, default=pathlib.Path("videos"), help="folder for what is written (videos)")
    add("--format", choices=FORMATS, default="mp4", help="of the videos (mp4)")
    add("--fps", type=positive(float), default=30, help="agent steps per second of video (30)")
    add("--size", type=positive(int), nargs=2, metavar=("H", "W"), help="of the video (the environment's own)")
    add("--mode", choices=["sample", "mode"], help="samples of the policy or its mode (the run's eval_mode)")
    panels = "also film truth | model | error, or curves of vectors, in turns seen and imagined"
    add("--openloop", action="store_true", help=panels)
    add("--caption", action="store_true", help="write step and score onto the video")
    add("--task", help="suite and task (the run's)")
    add("--seed", help="of environments and agent (the run's)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    options, rest = parser.parse_known_args(argv)
    for word in rest:
        near = difflib.get_close_matches(word.partition("=")[0], parser._option_string_actions, 1, 0.8)
        if word.startswith("--") and near:
            parser.error(f"{word}: unknown flag, did you mean {near[0]}?")
    for name in ("task", "seed", "device"):  # the configuration checks them
        rest += [f"--{name}={vars(options)[name]}"] if vars(options)[name] is not None else []
    if "none" in options.checkpoint and not options.use_random_agent:
        parser.error("give --checkpoint PATH, or --use-random-agent and --task")
    if options.use_random_agent and "none" not in options.checkpoint:
        parser.error("--use-random-agent needs a --checkpoint none")
    _expect([path for path in options.checkpoint if path != "none"], "checkpoint")
    _check(rest)
    options.output = options.output.expanduser()
    return options, rest


def of_doctor(argv: Sequence[str], about: str) -> tuple[list[str], Any]:
    """Read the command line of doctor.py; about: its docstring. Raises UserError.

    Returns: the words left for dreamer.py's configuration, and the configuration.
    """
    parser = Parser(
        prog="doctor.py",
        description=about.split("\n")[0],
        epilog="All other flags are those of dreamer.py, such as --device cuda:1 or --compile false.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _, words = parser.parse_known_args(argv)
    return words, _check([*CHECKED, *words])


def batch(text: str) -> str | int:
    """Read a number of environments, or any."""
    if text != "any" and not (text.isdigit() and int(text) > 0):
        raise ValueError
    return text if text == "any" else int(text)


def positive(kind: type) -> Callable[[str], Any]:
    """Return a reader of positive numbers."""

    def read(text: str) -> Any:
        number = kind(text)
        if not 0 < number < float("inf"):
            raise ValueError
        return number

    read.__name__ = f"positive {kind.__name__}"  # argparse names it in its error
    return read


def _parser(program: str, about: str) -> Parser:
    """Return a parser whose help begins and ends with the program's docstring."""
    first, *more = (part if part.startswith(" ") else textwrap.fill(part, WIDTH) for part in about.split("\n\n"))
    return Parser(program, None, first, "\n\n".join(more), formatter_class=_Formatter, allow_abbrev=False)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Lays out help in as many columns as that of dreamer.py has."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(WIDTH, shutil.get_terminal_size().columns - 2))


def _expect(paths: Sequence[str], what: str) -> None:
    """Raise UserError for a checkpoint, or its logdir, that is not there."""
    for text in paths:
        path = pathlib.Path(text).expanduser()
        if not path.exists():
            raise UserError(f"{path}: no such {what}")


def _check(words: Sequence[str]) -> Any:
    """Return the configuration of a command line of dreamer.py."""
    from training.config import CONFIGS, load_config  # which needs a package

    return load_config(words, CONFIGS)
