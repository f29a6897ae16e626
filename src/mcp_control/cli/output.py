"""Data to standard output: a table on a terminal, tab-separated lines when piped, or the format that was asked for.

Nothing is ever cut, and text from elsewhere cannot steer the terminal.
"""

import csv
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import Format

TERMINAL_LIMIT: Final = 100
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_STYLES: Final = {
    "completed": "green", "online": "green", "ok": "green", "passed": "green",
    "running": "cyan", "assigned": "cyan", "busy": "cyan",
    "failed": "red", "expired": "red", "rejected": "red", "offline": "red", "stalled": "red", "quarantined": "red",
    "cancelled": "yellow", "paused": "yellow", "draining": "yellow", "warned": "yellow", "warn": "yellow", "fail": "red",
    "\N{CHECK MARK}": "green", "!": "yellow", "\N{BALLOT X}": "red",
}  # fmt: skip


def say(text: str) -> None:
    """Talk to the person: to standard error."""
    sys.stderr.write(safe(text, keep_lines=True) + "\n")
    sys.stderr.flush()


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Say what goes on while it does: with a moving sign on a terminal, where it vanishes at the end; else as a line."""
    if not sys.stderr.isatty():
        say(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(safe(text)):
        yield


def safe(text: str, *, keep_lines: bool = False) -> str:
    """Return the text with control characters written out."""
    return _CONTROL.sub(
        lambda found: found[0] if keep_lines and found[0] in "\n\t" else _written(found[0]),
        text,
    )


def _written(character: str) -> str:
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return short.get(character) or (f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}")


def plain(thing: object) -> Any:
    """Return a struct of the API as plain values."""
    import msgspec

    return msgspec.json.decode(msgspec.json.encode(thing))


def dig(item: object, path: str) -> Any:
    """Return the value at a dotted path; None where there is none."""
    if isinstance(item, Mapping) and path in item:
        return item[path]
    value: Any = item
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, Sequence) and not isinstance(value, str) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def cell(value: object) -> str:
    """Return a value as one line of text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return safe(",".join(value))
    if isinstance(value, (dict, list)):
        return safe(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    return safe(str(value))


def write_json(value: object) -> None:
    """Write one JSON value: one line when piped, indented on a terminal."""
    if sys.stdout.isatty():
        text = json.dumps(value, indent=2, ensure_ascii=True)
    else:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class View:
    """How a command prints its data."""

    format: Format
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, out: Format | None, as_json: bool, fields: str) -> "View":
        """Return the view that the options ask for. Raises CliError."""
        if as_json and out not in (None, "json"):
            raise CliError(f"--json and -o {out} exclude each other", USAGE)
        names = tuple(name.strip() for name in fields.split(",") if name.strip())
        return cls("json" if as_json else out or "table", names)

    def many(
        self,
        items: Iterable[Any],
        columns: Sequence[str],
        wide: Sequence[str] = (),
        *,
        key: str = "id",
        limit: int | None = None,
    ) -> None:
        """Print a list. An empty one is `[]` in JSON, and a word on standard error in a table.

        Args:
            items: structs of the API, or mappings.
            columns: what a table shows.
            wide: what it shows beside that with `-o wide`.
            key: what `-o name` prints.
            limit: how many at most; None is 100 on a terminal and all elsewhere, 0 is all.
        """
        on_terminal = sys.stdout.isatty()
        most = (TERMINAL_LIMIT if on_terminal else 0) if limit is None else limit
        rows = self._cut((plain(item) if not isinstance(item, dict) else item for item in items), most)
        first = list(islice(rows, 1))  # what cannot be listed fails before anything is printed
        rows = chain(first, rows)
        match self.format:
            case "json":
                write_json([self._picked(row) for row in rows])
            case "jsonl":
                for row in rows:
                    sys.stdout.write(json.dumps(self._picked(row), ensure_ascii=False, separators=(",", ":")) + "\n")
            case "yaml":
                _write_yaml([self._picked(row) for row in rows])
            case "name":
                for row in rows:
                    sys.stdout.write(cell(dig(row, key)) + "\n")
            case "csv":
                self._csv(rows, self.fields or (*columns, *wide))
            case _:
                shown = self.fields or ((*columns, *wide) if self.format == "wide" else tuple(columns))
                lines = ([cell(dig(row, name)) for name in shown] for row in rows)
                if on_terminal:
                    table([name.rpartition(".")[2].upper() for name in shown], list(lines))
                else:
                    tabbed([name.upper() for name in shown], lines)
        sys.stdout.flush()

    def one(self, item: object, columns: Sequence[str] = (), *, key: str = "id") -> None:
        """Print one object; a table of its fields, without empty ones, where no format was asked for."""
        row = item if isinstance(item, dict) else plain(item)
        match self.format:
            case "json" | "jsonl":
                write_json(self._picked(row))
            case "yaml":
                _write_yaml(self._picked(row))
            case "name":
                sys.stdout.write(cell(dig(row, key)) + "\n")
            case "csv":
                self._csv(iter([row]), self.fields or tuple(columns) or tuple(row))
            case _:
                names = self.fields or (tuple(row) if self.format == "wide" or not columns else tuple(columns))
                lines = [[name, cell(value)] for name in names if (value := dig(row, name)) not in (None, "", {}, [])]
                if sys.stdout.isatty():
                    table(None, lines)
                else:
                    for line in lines:
                        sys.stdout.write("\t".join(line) + "\n")
        sys.stdout.flush()

    def _picked(self, row: Any) -> Any:
        return {name: dig(row, name) for name in self.fields} if self.fields else row

    def _cut(self, rows: Iterator[dict[str, Any]], most: int) -> Iterator[dict[str, Any]]:
        if most == 0:
            yield from rows
            return
        yield from islice(rows, most)
        if next(rows, None) is not None:
            say(f"… there are more than {most}: --limit 0 shows all")

    @staticmethod
    def _csv(rows: Iterator[dict[str, Any]], names: Sequence[str]) -> None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([cell(dig(row, name)) for name in names])


def tabbed(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Write lines of tab-separated cells under a head."""
    sys.stdout.write("\t".join(head) + "\n")
    for line in lines:
        sys.stdout.write("\t".join(line) + "\n")


def table(head: Sequence[str] | None, lines: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> None:
    """Write aligned columns to the terminal, without boxes and without cutting; long lines run on.

    `numbers` are the places of columns that are aligned at their right. A line ends with its text: blanks after it would run on, too.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    if not lines and head is not None:
        say("none")
        return
    shown = [*([head] if head is not None else []), *lines]
    widths = [max(cell_len(text) for text in column) for column in zip(*shown, strict=True)]
    console = Console(soft_wrap=True, highlight=False)
    for line in shown:
        written = Text(end="")
        for place, text in enumerate(line):
            gap = " " * (widths[place] - cell_len(text))
            last = place == len(line) - 1
            written.append("  " if place else "")
            written.append(gap if place in numbers else "")
            written.append(text, style="bold" if line is head else _STYLES.get(text, ""))
            written.append(gap if place not in numbers and not last else "")
        written.rstrip()
        console.print(written)


def _write_yaml(value: object) -> None:
    import yaml

    sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
