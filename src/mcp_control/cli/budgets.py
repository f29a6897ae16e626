"""What `mcpctl tasks budget` and `mcpctl runs budget` have in common: reading and raising limits."""

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import json_bytes
from mcp_control.cli.output import View

if TYPE_CHECKING:
    from mcp_control.sdk.client import Client
    from mcp_control.tasks.budget_model import Budget, BudgetEdit

SHOWN = ("owner", "exhausted", "left", "used", "reserved", "budget")


def _limit(name: str, what: str) -> Any:
    return typer.Option(f"--{name}", metavar="N|+N", help=f"{what}: N sets it, +N adds to it.", show_default=False)


WallSeconds = Annotated[str, _limit("wall-seconds", "Seconds of all attempts")]
Attempts = Annotated[str, _limit("attempts", "Attempts")]
Calls = Annotated[str, _limit("calls", "Calls")]
Tokens = Annotated[str, _limit("tokens", "Tokens")]
Money = Annotated[str, _limit("money", "Money, e.g. 2.50")]
Depth = Annotated[
    int | None, typer.Option("--depth", min=0, help="Levels of tasks below it, set to this.", show_default=False)
]
OnExhausted = Annotated[
    str, typer.Option("--on-exhausted", help="What follows when it is used up: stop, pause, ask.", show_default=False)
]
BudgetText = Annotated[
    str, typer.Option("--budget", metavar="JSON", help="What it may use: JSON or @file.", show_default=False)
]


def budget_from(text: str) -> "Budget | None":
    """Return the budget in an option's text, None for an empty one."""
    import msgspec

    from mcp_control.tasks.budget_model import Budget

    if not text:
        return None
    try:
        return msgspec.json.decode(json_bytes(text, "--budget"), type=Budget)
    except msgspec.ValidationError as error:
        raise CliError(f"--budget: {error}", USAGE) from None


def edit_from(limits: dict[str, str], depth: int | None, on_exhausted: str) -> "BudgetEdit | None":
    """Return the change that the options ask for, None where they ask for none."""
    import msgspec

    from mcp_control.tasks.budget_model import MICROS, BudgetEdit

    wanted: dict[str, dict[str, Any]] = {"set": {}, "add": {}}
    for name, text in limits.items():
        if not text:
            continue
        try:
            number = Decimal(text)
        except InvalidOperation:
            raise CliError(f"--{name.replace('_', '-')} takes N or +N, not {text}", USAGE) from None
        kind = "add" if text.startswith(("+", "-")) else "set"
        if name == "money":
            wanted[kind]["money_micros"] = int(number * MICROS)
        else:
            wanted[kind][name] = float(number) if name == "wall_seconds" else int(number)
    if depth is not None:
        wanted["set"]["depth"] = depth
    if on_exhausted:
        wanted["set"]["on_exhausted"] = on_exhausted
    if not wanted["set"] and not wanted["add"]:
        return None
    try:
        return msgspec.convert({name: value for name, value in wanted.items() if value}, BudgetEdit)
    except msgspec.ValidationError as error:
        raise CliError(str(error), USAGE) from None


def show_or_edit(client: "Client", owner: str, edit: "BudgetEdit | None", view: View) -> None:
    """Change a budget where that is asked for, and print it."""
    from mcp_control.sdk import calls

    found = client.do(calls.get_budget(owner) if edit is None else calls.edit_budget(owner, edit))
    view.one(found, SHOWN, key="owner")
