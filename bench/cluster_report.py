"""The table beside the JSON lines of the cluster's benchmarks, with the goals."""

from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.report import Floor, plain
from bench.statistics import Line

# By bench and mode (empty: any), for a machine of two cores that servers and databases share.
_GOALS: Final[dict[tuple[str, str], Floor]] = {
    ("T", "batched"): Floor("tasks_per_s", 1500),
    ("D", "same server"): Floor("p50_ms", 15, True),
    ("E", ""): Floor("p99_ms", 50, True),
    ("L", ""): Floor("p95_ms", 100, True),
}
_NAME: Final = ("bench", "mode", "route", "servers", "members", "queued")
_HIDDEN: Final = (*_NAME, "cpu_us", "runs", "durable")


def show(lines: Iterable[Line], console: Console) -> None:
    """Print the table."""
    table = Table(title="one line per measurement, medians")
    for name in ("bench", "figures", "goal", "µs of processor time per task"):
        table.add_column(name)
    for line in lines:
        words = [str(line["bench"])]
        words += [str(line[key]) for key in ("mode", "route") if key in line]
        words += [f"{line[key]:,} {key}" for key in ("servers", "members", "queued") if key in line]
        figures = ", ".join(f"{plain(value)} {key}" for key, value in line.items() if key not in _HIDDEN)
        goal = _GOALS.get((line["bench"], line.get("mode", "")), _GOALS.get((line["bench"], "")))
        asked = ""
        if goal is not None:
            colour = "green" if goal.met(line) else "red"
            asked = f"[{colour}]{'≤' if goal.at_most else '≥'} {plain(goal.value)} {goal.figure}[/]"
        cpu = ", ".join(f"{side} {value:,}" for side, value in line.get("cpu_us", {}).items())
        table.add_row(" ".join(words), figures, asked, cpu)
    console.print(table)
