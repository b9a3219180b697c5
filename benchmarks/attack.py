"""Attack runs: kill them, damage what they write, give them hostile environments, and let them go on and on.

    python3 benchmarks/attack.py --kills 40 --damage 1000 --spaces 200 --soak 20000
    python3 benchmarks/attack.py --damage 1000 --write docs/reliability.md

Each prints a table of what was seen, and --write puts it between its markers in a page. The exit status is 1 if a
promise of docs/reliability.md was broken; details are on stderr. The same seed makes the same attacks, but a kill hits
what the run happens to do at its moment.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/attack.py")  # before the first package is imported

from benchmarks.pages import machine, markdown, write_between

KINDS = {
    "kills": "kill runs at random moments and resume them",
    "damage": "damage files of a run and read them",
    "spaces": "train in environments with any spaces, observations, rewards and flags",
    "soak": "make so many updates and watch memory, descriptors, threads and processes",
}


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the attacks (0)")
    parser.add_argument("--write", metavar="PAGE", help="put the tables between their markers in this page")
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) for name in KINDS if getattr(args, name) > 0}
    if not chosen:
        parser.error(f"choose at least one of {', '.join('--' + name for name in KINDS)}")
    broken = 0
    for name, number in chosen.items():
        where, begin = machine(), time.monotonic()
        columns, bad = ATTACKS[name](number, args.seed)
        broken += bad
        command = f"`python3 benchmarks/attack.py --{name} {number} --seed {args.seed}`"
        spent = f"{command}: {(time.monotonic() - begin) / 60:.0f} minutes. {where}."
        text = f"{table(columns)}\n\n{spent}"
        print(text, flush=True)
        if args.write:
            write_between(args.write, name, text)
    print(f"{broken} promises broken" if broken else "all promises kept")
    return 1 if broken else 0


def table(columns):
    """Return a table with a row for each thing that was counted and a column for each {name: Counter}."""
    names = list(dict.fromkeys(key for counts in columns.values() for key in counts))
    rows = [[name, *(f"{counts[name]:,}" if name in counts else "-" for counts in columns.values())] for name in names]
    return markdown(["", *columns], rows)


# Each returns ({column: Counter}, number of broken promises). What an attack needs is imported when it is asked for.


def kills(number, seed):
    from benchmarks.attack_kills import BROKEN, attack_kills

    seen = attack_kills(number, seed)
    return {"seen": seen}, sum(seen[name] for name in BROKEN)


def damage(number, seed):
    from benchmarks.attack_damage import BROKEN, attack_damage

    seen = attack_damage(number, seed)
    return seen, sum(counts[name] for counts in seen.values() for name in BROKEN)


def spaces(number, seed):
    from benchmarks.attack_spaces import BROKEN, attack_spaces

    seen = attack_spaces(number, seed)
    return {"seen": seen}, sum(seen[name] for name in BROKEN)


def soak(number, seed):
    from benchmarks.attack_soak import BROKEN, attack_soak

    seen = attack_soak(number)
    return {"seen": seen}, sum(seen[name] for name in BROKEN)


ATTACKS = {"kills": kills, "damage": damage, "spaces": spaces, "soak": soak}

if __name__ == "__main__":
    sys.exit(main())
