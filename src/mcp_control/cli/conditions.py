"""Conditions on the command line: `--where type=echo --where 'priority>=70' --where 'created<2h'`."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import typer

from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import seconds

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="All tasks that fulfil this; repeatable, all must hold: state= type= run= group= agent= label.NAME= code= class= "
        "priority>= priority<= created> created< ended> ended< (a time, or how long ago: 2h).",
        show_default=False,
    ),
]
_FORM: Final = re.compile(r"([a-z]+)(?:\.([^=<>]+))?(>=|<=|=|<|>)(.*)", re.DOTALL)
_EQUAL: Final = {
    "type": "type",
    "run": "run",
    "group": "group",
    "agent": "agent",
    "code": "code",
    "class": "error_class",
}
_MOMENTS: Final = {
    ("created", ">"): "created_after",
    ("created", "<"): "created_before",
    ("ended", ">"): "ended_after",
    ("ended", "<"): "ended_before",
}
_PRIORITY: Final = {">=": ("priority_min",), "<=": ("priority_max",), "=": ("priority_min", "priority_max")}


def conditions_from(given: list[str] | None, now: datetime) -> dict[str, Any]:
    """Return the conditions as the API takes them. Raises CliError."""
    found: dict[str, Any] = {}
    for text in given or ():
        form = _FORM.fullmatch(text.strip())
        if form is None:
            raise CliError(f"{text!r} is no condition", USAGE, "write --where type=echo or --where 'priority>=70'")
        name, part, sign, value = form.groups()
        if name == "label" and part and sign == "=":
            found.setdefault("labels", {})[part] = value
        elif name == "state" and part is None and sign == "=":
            found.setdefault("state", []).extend(value.split(","))
        elif name in _EQUAL and part is None and sign == "=":
            found[_EQUAL[name]] = value
        elif (name, sign) in _MOMENTS and part is None:
            found[_MOMENTS[(name, sign)]] = _moment(value, now)
        elif name == "priority" and part is None and sign in _PRIORITY and value.isdigit():
            found |= dict.fromkeys(_PRIORITY[sign], int(value))
        else:
            raise CliError(f"{text!r} is no condition", USAGE, "`mcpctl tasks cancel --help` names them")
    return found


def _moment(text: str, now: datetime) -> str:
    if re.fullmatch(r"\d+(?:\.\d+)?\s*(?:ms|s|m|h|d)", text):
        return (now - timedelta(seconds=seconds(text) or 0.0)).astimezone(UTC).isoformat()
    return text
