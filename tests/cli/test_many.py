"""Many tasks at once and dead letters, on the command line."""

from datetime import UTC, datetime

import pytest

from mcp_control.cli.budgets import budget_from
from mcp_control.cli.bulk import bound_of
from mcp_control.cli.conditions import conditions_from
from mcp_control.cli.errors import CliError
from mcp_control.tasks.budget_model import Budget
from mcp_control.tasks.operation_model import Preview
from tests.cli.conftest import Cli, Up

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def test_conditions_are_read_as_they_are_written() -> None:
    """Every kind of condition; a time may be told as how long ago."""
    given = [
        "type=a",
        "state=queued,failed",
        "label.team=x=y",
        "priority>=70",
        "created<2h",
        "ended>2026-01-01T00:00:00Z",
    ]
    assert conditions_from([*given, "class=critical", "code=E"], NOW) == {
        "type": "a",
        "state": ["queued", "failed"],
        "labels": {"team": "x=y"},
        "priority_min": 70,
        "created_before": "2026-11-22T10:00:00+00:00",
        "ended_after": "2026-01-01T00:00:00Z",
        "error_class": "critical",
        "code": "E",
    }


@pytest.mark.parametrize(
    "wrong", ["", "type", "label=x", "type>a", "priority=high", "age<2h", "priority<3", "state.x=y"]
)
def test_what_is_no_condition_is_refused(wrong: str) -> None:
    """A misspelt condition would mean too many tasks."""
    with pytest.raises(CliError):
        conditions_from([wrong], NOW)


def test_many_tasks_are_shown_first_and_then_cancelled(cli: Cli, panel: Up) -> None:
    """`--dry-run` counts; without a yes nothing happens; with it all that were shown are cancelled, and the operation is listed."""
    for _ in range(3):
        cli.inside("tasks", "submit", "tests.many")
    where = ("--where", "type=tests.many")
    assert cli.json("tasks", "cancel", *where, "--dry-run")["matched"] == 3
    cli("--no-input", "tasks", "cancel", *where, code=2)
    assert cli.json("tasks", "pause", *where, "--yes")["changed"] == 3
    assert cli.json("tasks", "reprioritize", "high", *where, "--yes")["changed"] == 3
    done = cli.json("tasks", "cancel", *where, "--yes", "--reason", "test")
    assert (done["state"], done["matched"], done["changed"]) == ("completed", 3, 3)
    assert done["id"] in [one["id"] for one in cli.json("operations", "ls")]
    assert cli.json("operations", "get", done["id"])["reason"] == "test"
    assert {one["state"] for one in cli.json("tasks", "ls", "--type", "tests.many")} == {"cancelled"}
    cli("tasks", "retry", *where, "--yes", "--at-most", "2", code=1)
    assert cli.json("tasks", "retry", *where, "--dry-run", "--at-most", "2")["matched"] == 3
    assert cli.json("tasks", "retry", *where, "--yes")["changed"] == 3
    assert len(cli.json("tasks", "ls", "--type", "tests.many")) == 6
    cli("tasks", "retry", *where, "--wait", code=2)
    assert cli.json("tasks", "cancel", *where, "--yes", "--at-most", "3")["changed"] == 3


@pytest.mark.parametrize(
    ("more", "at_most", "bound"),
    [
        (False, None, 7),
        (False, 9, 7),
        (True, 9, 9),
        (True, 7, 7),
        (False, 6, None),
        (True, 6, None),
        (True, None, None),
    ],
)
def test_no_more_is_acted_on_than_was_shown_or_allowed(more: bool, at_most: int | None, bound: int | None) -> None:
    """What was counted is the bound; where there are too many to be counted, the person must say one; a smaller one refuses."""
    found = Preview(matched=7, more=more, first=[])
    if bound is None:
        with pytest.raises(CliError):
            bound_of(found, at_most)
    else:
        assert bound_of(found, at_most) == bound


def test_a_budget_is_read_as_it_is_written() -> None:
    """One limit at a time, or all as JSON; money is in whole units, and what is no limit is refused."""
    assert budget_from(None) is None
    given = ["tokens=500", "money=2.5", "wall_seconds=1.5", "on_exhausted=ask"]
    assert budget_from(given) == Budget(tokens=500, money_micros=2_500_000, wall_seconds=1.5, on_exhausted="ask")
    assert budget_from(['{"tokens": 5, "depth": 1}', "tokens=6"]) == Budget(tokens=6, depth=1)
    for wrong in ("tokens", "tokens=many", "token=5", "on_exhausted=laugh", "[1]"):
        with pytest.raises(CliError):
            budget_from([wrong])


def test_dead_letters_are_shown_replayed_and_discarded(cli: Cli, panel: Up) -> None:
    """`dlq ls|show|replay|discard`: what is replayed or discarded is no dead letter any more."""
    for _ in range(2):
        cli.inside("tasks", "submit", "tests.refuse", "--label", "dlq=yes", "--wait", code=8)
    letters = cli.json("dlq", "ls", "--label", "dlq=yes")
    assert [one["failure"]["code"] for one in letters] == ["E_NEVER", "E_NEVER"]
    first, second = (one["id"] for one in letters)
    assert cli.json("dlq", "show", first)["attempts"]
    again = cli.json("dlq", "replay", first, "--payload", '{"right": 1}')
    assert again["retry_of"] == first
    cli.inside("tasks", "watch", again["id"], code=8)
    cli.inside("dlq", "replay", first, code=5)
    for verb in ("discard", "replay"):
        # A trial goes with conditions: with an id it would be no trial.
        cli.inside("dlq", verb, second, "--dry-run", code=2)
    assert second in [one["id"] for one in cli.json("dlq", "ls", "--label", "dlq=yes")]
    cli.inside("dlq", "discard", second, "--reason", "harmless")
    assert [one["id"] for one in cli.json("dlq", "ls", "--label", "dlq=yes")] == [again["id"]]
    assert cli.json("dlq", "discard", "--where", "label.dlq=yes", "--yes")["changed"] == 1
    assert cli.json("dlq", "parked") == []
