"""Options that many commands share, and how their values are read."""

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from mcp_control.cli.errors import USAGE, CliError

if TYPE_CHECKING:
    from mcp_control.tasks.model import Needs

Format = Literal["table", "wide", "json", "jsonl", "yaml", "csv", "name"]

Json = Annotated[bool, typer.Option("--json", help="Print whole objects as JSON.")]
Out = Annotated[
    Format | None,
    typer.Option(
        "-o",
        "--format",
        help="How to print: a table on a terminal, tab-separated when piped, or this.",
        show_default=False,
    ),
]
Fields = Annotated[
    str,
    typer.Option(
        "--fields", metavar="A,B", help="Print these fields only; dots reach inside (a.b).", show_default=False
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=0,
        help="Items at most; 0 is all. Default: 100 on a terminal, all when piped.",
        show_default=False,
    ),
]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Wait for the end; exit code 8 when it failed.")]
Timeout = Annotated[
    str,
    typer.Option(
        "--timeout",
        metavar="TIME",
        help="Stop waiting after this time (90, 2m, 1h): exit code 7, the work goes on.",
        show_default=False,
    ),
]
Reason = Annotated[str, typer.Option("--reason", help="Why, for those who look later.", show_default=False)]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label; repeatable.", show_default=False)
]
ResultsTo = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="With --wait: download the results there.", show_default=False),
]

NO_INPUT: Final = "MCP_CONTROL_NO_INPUT"
YES: Final = "MCP_CONTROL_YES"
_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def seconds(text: str) -> float | None:
    """Return the seconds of a time such as 90, 1.5s, 2m, 1h; None for an empty one. Raises CliError."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", text.strip())
    if found is None:
        raise CliError(f"{text!r} is no time", USAGE, "write 90, 90s, 2m, 1.5h or 1d")
    return float(found[1]) * _UNITS[found[2]]


def pairs(given: list[str] | None) -> dict[str, str]:
    """Return labels from NAME=VALUE arguments. Raises CliError."""
    found: dict[str, str] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise CliError(f"{text!r} is no label", USAGE, "write --label NAME=VALUE")
        found[name] = value
    return found


def counts(option: str, given: list[str] | None) -> dict[str, int]:
    """Return whole numbers from NAME=N arguments. Raises CliError."""
    found: dict[str, int] = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        if not name or not value.isdecimal():
            raise CliError(f"{text!r} is no number of something", USAGE, f"write {option} NAME=N")
        found[name] = int(value)
    return found


def json_argument(text: str, what: str) -> Any:
    """Return the value of a JSON argument: JSON itself, `@file`, or `-` for standard input. Raises CliError."""
    return json.loads(json_bytes(text, what))


def json_bytes(text: str, what: str) -> bytes:
    """Return the JSON of an argument as it was written, checked. Raises CliError."""
    try:
        raw = (
            sys.stdin.buffer.read()
            if text == "-"
            else Path(text[1:]).read_bytes()
            if text.startswith("@")
            else text.encode()
        )
    except OSError as error:
        raise CliError(f"{text[1:]}: {error.strerror}", USAGE) from None
    try:
        json.loads(raw)
    except ValueError as error:
        raise CliError(
            f"{what} is not JSON: {error}", USAGE, f"quote it for the shell: {what} '{{\"a\": 1}}', or use @file or -"
        ) from None
    return raw


def loose(text: str) -> Any:
    """Return a value given on the command line: JSON where it is JSON (numbers, true, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def may_ask() -> bool:
    """Say whether a question to the person can be asked."""
    return not os.environ.get(NO_INPUT) and sys.stdin.isatty()


def confirm(question: str) -> None:
    """Go on when the person says yes, or has said so with --yes. Raises CliError."""
    if os.environ.get(YES):
        return
    if not may_ask():
        raise CliError(f"{question} Not without a yes.", USAGE, "repeat the command with --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CliError("Left as it was.")


def needs_from(
    agent: str, slots: int, resources: Mapping[str, str], sticky: str, hard: bool, balancing: str
) -> "Needs":
    """Return what a task needs, from options. Raises CliError."""
    import msgspec

    from mcp_control.tasks.model import Needs

    given: dict[str, object] = {"slots": slots, "resources": dict(resources)}
    if agent:
        given["agent"] = agent
    if sticky:
        given["sticky"] = {"key": sticky, "mode": "hard" if hard else "soft"}
    if balancing:
        given["balancing"] = balancing
    try:
        return msgspec.convert(given, Needs, strict=False)
    except msgspec.ValidationError as error:
        raise CliError(
            f"no such need: {error}",
            USAGE,
            "resources are cpu=N, memory_mb=N and gpu=N; see mcpctl tasks submit --help",
        ) from None
