"""The table beside the JSON lines, with the floors, and the ratios to recorded results of other systems."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.statistics import Line


class Floor(NamedTuple):
    """What a figure must reach: at least, or at most."""

    figure: str
    value: float
    at_most: bool = False

    def met(self, line: Mapping[str, Any]) -> bool:
        """Say whether the line reaches it."""
        found = float(line[self.figure])
        return found <= self.value if self.at_most else found >= self.value


# By bench, mode (empty: any) and rows (0: any), for a machine of two cores.
_FLOORS: Final[dict[tuple[str, str], tuple[Floor, ...]]] = {
    ("T", "batched"): (Floor("tasks_per_s", 6000),),
    ("T", "single"): (Floor("tasks_per_s", 3000),),
    ("L", "http"): (Floor("p50_ms", 2.5, True), Floor("p99_ms", 8, True)),
    ("C", ""): (Floor("p50_ms", 9, True), Floor("chains_per_s", 500)),
    ("D", "1000 stages"): (Floor("accept_ms", 1000, True),),
    ("B", "fastest"): (Floor("times_faster", 1.5),),
    ("H", "post"): (Floor("requests_per_s", 3000), Floor("p99_ms", 50, True)),
}
_ALL_ROWS: Final = 100_000
_FIGURES: Final = (
    "tasks_per_s",
    "chains_per_s",
    "requests_per_s",
    "rows_per_s",
    "seconds",
    "accept_ms",
    "start_ms",
    "held_ms",
    "mean_ms",
    "p50_ms",
    "p99_ms",
    "times_faster",
    "errors",
)
_CPU: Final = ("server_cpu_us", "agent_cpu_us", "client_cpu_us")


def floors(line: Line) -> tuple[Floor, ...]:
    """Return the floors that hold for this line."""
    if line["bench"] == "P" and line["rows"] >= _ALL_ROWS and line["agents"] == 2:
        return (Floor("seconds", 60, True),)
    return _FLOORS.get((line["bench"], line.get("mode", "")), ())


def show(lines: Iterable[Line], console: Console) -> None:
    """Print the table."""
    table = Table(title="one line per measurement, medians")
    for name in ("bench", "figures", "floors", "processor time per task (server, agent, client)"):
        table.add_column(name)
    for line in lines:
        name = " ".join(str(line[key]) for key in ("bench", "mode") if key in line)
        if line["bench"] == "P":
            name += f" {line['rows']:,} rows, {line['agents']} agent{'s' * (line['agents'] > 1)}"
        figures = ", ".join(f"{plain(line[key])} {key}" for key in _FIGURES if key in line)
        asked = ", ".join(
            f"[{'green' if floor.met(line) else 'red'}]{'≤' if floor.at_most else '≥'} {plain(floor.value)} {floor.figure}[/]"
            for floor in floors(line)
        )
        cpu = ", ".join(f"{line[key]:,.0f} µs" for key in _CPU if key in line)
        table.add_row(name, figures, asked, cpu)
    console.print(table)


def plain(value: float) -> str:
    """Return a figure as it is shown."""
    return f"{value:,.0f}" if value >= 100 else f"{value:g}"


class _Match(NamedTuple):
    bench: str
    mode: str
    ours: str
    theirs: str
    lower: bool = False


_MATCHES: Final = (
    _Match("T", "batched", "tasks_per_s", "tasks_per_s"),
    _Match("T", "single", "tasks_per_s", "tasks_per_s"),
    _Match("L", "http", "p50_ms", "e2e_p50_ms", lower=True),
    _Match("L", "http", "p99_ms", "e2e_p99_ms", lower=True),
    _Match("C", "", "p50_ms", "chain6_p50_ms", lower=True),
    _Match("C", "", "chains_per_s", "chain6_per_s"),
)


def ratios(lines: list[Line], peers: Path) -> list[Line]:
    """Return, per figure, how many times better than the best recorded peer this run was (below 1: worse).

    Args:
        peers: a folder with `data/peers.jsonl`, one JSON object per peer and setting.

    Raises:
        OSError: it cannot be read.
    """
    recorded = [json.loads(text) for text in (peers / "data" / "peers.jsonl").read_text().splitlines() if text.strip()]
    found: list[Line] = []
    for match in _MATCHES:
        mine = next((x for x in lines if (x["bench"], x.get("mode", "")) == (match.bench, match.mode)), None)
        theirs = [peer for peer in recorded if isinstance(peer.get(match.theirs), (int, float))]
        if mine is None or not theirs:
            continue
        choose: Callable[..., Any] = min if match.lower else max
        best = choose(theirs, key=lambda peer, figure=match.theirs: peer[figure])
        ratio = best[match.theirs] / mine[match.ours] if match.lower else mine[match.ours] / best[match.theirs]
        found.append(
            {
                "bench": "peers",
                "of": f"{match.bench} {match.mode}".strip(),
                "figure": match.ours,
                "ours": mine[match.ours],
                "best": best[match.theirs],
                "peer": f"{best['peer']} ({best['mode']})",
                "times_better": round(ratio, 2),
            }
        )
    return found


def show_ratios(found: Iterable[Line], console: Console) -> None:
    """Print the ratios."""
    table = Table(title="beside the best recorded peer")
    for name in ("of", "figure", "ours", "best", "peer", "times_better"):
        table.add_column(name)
    for line in found:
        table.add_row(*(str(line[name]) for name in ("of", "figure", "ours", "best", "peer", "times_better")))
    console.print(table)
