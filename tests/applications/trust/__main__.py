"""``python -m tests.applications.trust [NAME ...] [--part 0.1]``: what is promised of runs and files, tried in full.

    kills  studies  flips  cuts  options  memory  signals  writers

By default all of them, in the sizes of docs/quality.md; ``--part`` makes each so much smaller.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch counts its threads: children are forks

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.applications.trust import trials
from tests.applications.trust.commands import COMMANDS
from tests.applications.trust.trials import Found, Shared

FULL: dict[str, Callable[[float, Path, Shared], Found]] = {
    **{
        f"kills of {name}": lambda part, folder, shared, name=name: trials.kills(  # type: ignore[misc]
            round(50 * part), folder, shared, (name,)
        )
        for name in trials.TINY
    },
    "studies": lambda part, folder, shared: trials.studies(round(50 * part), folder),
    "flips": lambda part, folder, shared: trials.flips(round(1500 * part), shared),
    "cuts": lambda part, folder, shared: trials.cuts(round(200 * part), folder, shared),
    **{f"options of {name}": partial(trials.options, name) for name in COMMANDS},
    "memory": lambda part, folder, shared: trials.memory(1800 * part, folder, shared),
    "signals": lambda part, folder, shared: trials.signals(round(10 * part), folder, shared),
    "writers": lambda part, folder, shared: trials.writers(round(20 * part), folder),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="those that are called so, or have one of these words in their name")
    parser.add_argument("--part", type=float, default=1.0)
    given = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as together, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared = trials.Shared(Path(together))
        os.environ["BILEVEL_DATA"] = str(shared.data)
        for name, run in FULL.items():
            if given.names and not any(word == name or word in name.split() for word in given.names):
                continue
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = run(given.part, Path(folder), shared)
            print(f"{name}: {found} ({time.perf_counter() - begun:.0f} s)", flush=True)
            failed += found.failed
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
