"""`python -m bench`: run the benchmarks, JSON lines on standard output, a table on standard error."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console

from bench import profile
from bench.balancing import balancing
from bench.definitions import definitions
from bench.limits import limits
from bench.loads import chains, latency, throughput
from bench.report import ratios, show, show_ratios
from bench.stand import machine
from bench.statistics import Line
from bench.techdeck import conversations
from bench.wrk import http

PEERS: Final = "MCP_CONTROL_BENCH_PEERS"
_IDLE: Final = 0.5
_QUICK_ROWS: Final = 10_000
_ALL_ROWS: Final = 100_000

Bench = Callable[[int], Coroutine[Any, Any, list[Line]]]
BENCHES: Final[dict[str, Bench]] = {
    "T": throughput,
    "L": latency,
    "C": chains,
    "D": definitions,
    "H": http,
    "B": balancing,
    "K": limits,
    "P": lambda reps: conversations(reps, _QUICK_ROWS),
}


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help=f"also P with {_ALL_ROWS:,} rows, and ratios to {PEERS}")
    parser.add_argument("--only", default=",".join(BENCHES), help="which of T,L,C,D,H,B,K,P, with commas")
    parser.add_argument("--reps", type=int, default=3, help="repetitions; the median counts")
    parser.add_argument("--json", action="store_true", help="no table, JSON lines only")
    parser.add_argument(
        "--profile", action="store_true", help="one repetition with the server sampled: where its time goes"
    )
    given = parser.parse_args(arguments)
    wanted = [name.strip().upper() for name in given.only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in BENCHES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    console = Console(stderr=True, quiet=given.json, width=None if sys.stderr.isatty() else 150)

    here = machine()
    _say({"bench": "machine", **here})
    if here["load"] > _IDLE:
        console.print(f"[yellow]The machine is busy (load {here['load']}): expect lower figures than it can reach.[/]")

    if given.profile:
        for name in wanted:
            print(uvloop.run(profile.profiled(name)))
        return 0

    lines: list[Line] = []
    todo = [(name, BENCHES[name], given.reps) for name in wanted]
    if given.full and "P" in wanted:
        todo.append(("P", lambda reps: conversations(reps, _ALL_ROWS), given.reps))
    for name, bench, reps in todo:
        console.print(f"{name} …")
        for line in uvloop.run(bench(reps)):
            _say(line)
            lines.append(line)
    show(lines, console)

    peers = os.environ.get(PEERS)
    if given.full and peers:
        found = ratios(lines, Path(peers))
        for line in found:
            _say(line)
        show_ratios(found, console)
    return 0


def _say(line: Line) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
