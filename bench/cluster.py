"""`python -m bench.cluster`: the benchmarks of a cluster, JSON lines on standard output, a table on standard error."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop
from rich.console import Console

from bench.cluster_events import fanout
from bench.cluster_growth import growth
from bench.cluster_loads import dispatch, throughput, without_redis
from bench.cluster_report import show
from bench.cluster_stand import Databases, databases
from bench.stand import machine
from bench.statistics import Line

_IDLE: Final = 0.5
_SIZES: Final = [1_000, 10_000, 100_000]
_LARGEST: Final = 1_000_000
Bench = Callable[[Databases, argparse.Namespace], Coroutine[Any, Any, list[Line]]]
BENCHES: Final[dict[str, Bench]] = {
    "T": lambda there, given: throughput(there, given.reps),
    "D": lambda there, given: dispatch(there, given.rounds),
    "G": lambda there, given: growth(there, _SIZES + ([_LARGEST] if given.full else []), given.rounds // 3),
    "E": lambda there, given: fanout(there, 1000, 100, 10.0),
    "R": lambda there, given: without_redis(there, given.reps, given.rounds),
}


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also with 1,000,000 queued tasks")
    parser.add_argument("--only", default=",".join(BENCHES), help=f"which of {','.join(BENCHES)}, with commas")
    parser.add_argument("--reps", type=int, default=2, help="repetitions; the median counts")
    parser.add_argument("--rounds", type=int, default=150, help="tasks per latency")
    parser.add_argument("--json", action="store_true", help="no table, JSON lines only")
    parser.add_argument("--profile", action="store_true", help="where the time of servers and database goes")
    given = parser.parse_args(arguments)
    wanted = [name.strip().upper() for name in given.only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in BENCHES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    console = Console(stderr=True, quiet=given.json, width=None if sys.stderr.isatty() else 170)

    here = {**machine(), "load": round(os.getloadavg()[0], 2)}
    _say({"bench": "machine", **here})
    if here["load"] > _IDLE:
        console.print(f"[yellow]The machine is busy (load {here['load']}): expect lower figures than it can reach.[/]")
    lines: list[Line] = []
    with databases() as there:
        if given.profile:
            from bench.cluster_profile import profiled

            print(uvloop.run(profiled(there)))
            return 0
        for name in wanted:
            console.print(f"{name} …")
            for line in uvloop.run(BENCHES[name](there, given)):
                _say(line)
                lines.append(line)
    show(lines, console)
    return 0


def _say(line: Line) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
