"""What `mcpctl tasks budget` and `mcpctl runs budget` have in common: reading and raising limits."""

from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mcp_control.cli.errors import USAGE, CliError
from mcp_control.cli.options import json_argument
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
BudgetTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="NAME=N",
        help="What it may use (tokens=50000, money=2.50, on_exhausted=ask), repeatable; or all of it as JSON or @file.",
        show_default=False,
    ),
]


def budget_from(given: list[str] | None) -> "Budget | None":
    """Return the budget that options say, None without any: `NAME=N` each (money in whole units), or JSON. Raises CliError."""
    import msgspec

    from mcp_control.tasks.budget_model import Budget

    wanted: dict[str, Any] = {}
    for text in given or ():
        if text.startswith(("{", "@")) or text == "-":
            found = json_argument(text, "--budget")
            wanted |= found if isinstance(found, dict) else {"": found}
            continue
        name, sign, value = text.partition("=")
        if not sign:
            raise CliError(
                f"--budget {text}: not NAME=N", USAGE, "e.g. --budget tokens=50000 --budget on_exhausted=ask"
            )
        if name == "on_exhausted":
            wanted[name] = value
        else:
            wanted["money_micros" if name == "money" else name] = _amount("budget", name, value)
    try:
        return msgspec.convert(wanted, Budget) if wanted else None
    except msgspec.ValidationError as error:
        raise CliError(f"--budget: {error}", USAGE) from None


def _amount(option: str, name: str, text: str) -> int | float:
    """Return an amount as budgets count it. Raises CliError."""
    from mcp_control.tasks.budget_model import MICROS

    try:
        number = Decimal(text)
    except InvalidOperation:
        raise CliError(f"--{option} takes a number, not {text}", USAGE) from None
    if name == "money":
        return int(number * MICROS)
    return float(number) if name == "wall_seconds" else int(number)


def edit_from(limits: dict[str, str], depth: int | None, on_exhausted: str) -> "BudgetEdit | None":
    """Return the change that the options ask for, None where they ask for none."""
    import msgspec

    from mcp_control.tasks.budget_model import BudgetEdit

    wanted: dict[str, dict[str, Any]] = {"set": {}, "add": {}}
    for name, text in limits.items():
        if not text:
            continue
        kind = "add" if text.startswith(("+", "-")) else "set"
        amount = _amount(name.replace("_", "-"), name, text)
        wanted[kind]["money_micros" if name == "money" else name] = amount
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
