"""Run many trainings: a grid, a random or a guided search over keys, each trial with several seeds.

    python3 sweep.py --config sweep.yaml

The file names the keys as dreamer.py does; docs/sweeps.md says how. The same command goes on where it was ended.
"""

import contextlib
import signal
import sys
from types import SimpleNamespace

from training import installed

if __name__ == "__main__":
    installed.demand("sweep.py")  # before the first package is imported

from sweeps.plan import read_plan
from sweeps.settings import usage
from tools import Parser, UserError, guard_output, locked
from training.console import print_line
from training.signals import signals_noted


def main(argv=None):
    """Run the command line; return the exit status: 0 if all trials are done, 1 if some failed, 128 + a signal's."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage())
        return 0
    parser = Parser(prog="sweep.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    try:
        options, flags = parser.parse_known_args(argv)
        plan = read_plan(options.config, flags)
        with contextlib.ExitStack() as stack:
            return run(plan, stack)
    except UserError as error:
        print_line(f"sweep.py: {error}")
        return 2
    except KeyboardInterrupt:
        print_line("sweep.py: ended at once")
        return 128 + signal.SIGINT


def run(plan, stack):
    """Run the trials of a plan that are not done yet; print what came of all; return the exit status."""
    from sweeps.conduct import Sweep
    from sweeps.processes import make_launcher
    from sweeps.report import report
    from sweeps.study import open_study

    plan.folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(plan.folder))
    for path in (plan.folder / "trials").glob("*.tmp"):  # a kill has left
        path.unlink()
    study = open_study(plan)
    sweep = Sweep(plan, study, make_launcher(plan, stack))
    ending = SimpleNamespace(stopped=None, save_asked=False, again=0)

    def acknowledge(name, again=False):
        ending.again += again
        print_line(f"{name}: ending the trials; each saves what it has (again: each leaves an environment that hangs)")

    with signals_noted(ending, acknowledge):
        failed = sweep.run(ending)
    report(plan, study)
    return 128 + ending.stopped if ending.stopped else int(failed > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program at once until there is something to save
    guard_output()
    sys.exit(main())
