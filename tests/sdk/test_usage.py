"""What an attempt tells of its usage: totals that only grow, what is held, and how they travel."""

from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.sdk.runtime.outbox import Outbox
from mcp_control.sdk.usage import Meter, Reservation, counted, micros
from mcp_control.tasks.budget_model import SpendAnswer, Spent
from mcp_control.tasks.wire import Ack, Assignment, Done

GIVEN = Assignment(
    task_id="task_1",
    type="t",
    attempt=1,
    fence="1.1",
    lease_token="x",
    payload=msgspec.Raw(b"null"),
    budget={"tokens": 1000.0, "wall_seconds": 60.0},
)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50), st.booleans()), max_size=30))
def test_what_is_told_are_totals_that_only_grow(steps: list[tuple[bool, int, bool]]) -> None:
    """Whatever is used, reserved, refused or given back: the last telling has everything used and exactly what is held."""
    told: list[Spent] = []
    meter = Meter(GIVEN, told.append)
    used = 0
    held: list[tuple[Reservation, int]] = []
    for reserves, tokens, kind in steps:
        if reserves:
            amounts = counted(0, tokens, 0)
            meter.ask(amounts)
            granted = meter.answered(amounts, SpendAnswer(granted=kind, left={"tokens": 1000.0 - used}))
            assert granted is kind
            held.append((Reservation(meter, amounts, granted), tokens if granted else 0))
        elif held and kind:
            reservation, _ = held.pop()
            reservation.use(tokens=tokens)
            used += tokens
        else:
            meter.use(counted(0, tokens, 0))
            used += tokens
    meter.use({})
    assert told[-1].tokens == used
    assert told[-1].held.get("tokens", 0) == sum(tokens for _, tokens in held)
    assert [one.number for one in told] == sorted({one.number for one in told})
    assert [one.tokens for one in told] == sorted(one.tokens for one in told)


def test_what_is_used_while_an_answer_is_awaited_is_told_after_it() -> None:
    """The newest telling is the truth, so nothing may overtake a question."""
    told: list[Spent] = []
    meter = Meter(GIVEN, told.append)
    meter.ask({"tokens": 10})
    meter.use({"tokens": 5})
    assert told == []
    assert meter.answered({"tokens": 10}, SpendAnswer(granted=True, left={"tokens": 990.0}))
    assert (told[-1].tokens, told[-1].held) == (5, {"tokens": 10})
    assert meter.left is not None
    assert meter.left["tokens"] == 990.0


def test_left_is_known_without_asking() -> None:
    """What the server said, less what was used since; time runs by itself; nothing is known without a budget."""
    meter = Meter(GIVEN, lambda _: None)
    meter.use({"tokens": 300})
    assert meter.left is not None
    assert meter.left["tokens"] == 700
    assert 59 < meter.left["wall_seconds"] <= 60
    assert Meter(msgspec.structs.replace(GIVEN, budget=None), lambda _: None).left is None


def test_money_is_counted_in_millionths_rounded_up() -> None:
    """No fraction is lost to the spender, and nothing is given back."""
    assert (micros("0.0000001"), micros(Decimal("2.50")), micros(0.1)) == (1, 2_500_000, 100_000)
    with pytest.raises(ValueError, match="not given back"):
        micros(-1)
    with pytest.raises(ValueError, match="not given back"):
        counted(0, -1, 0)


def test_usage_travels_with_the_end_and_the_newest_wins() -> None:
    """One entry per task in a report, in the same one as its end; what was not acknowledged is said again unless there is newer."""
    outbox = Outbox()
    outbox.used("task_1", "x", Spent(number=1, tokens=1))
    first = outbox.take()
    assert [used.spent.tokens for used in first.used] == [1]
    outbox.used("task_1", "x", Spent(number=2, tokens=2))
    assert not outbox.urgent, "one report at a time"
    outbox.resend()
    assert [used.spent.tokens for used in outbox.take().used] == [2]
    outbox.used("task_1", "x", Spent(number=3, tokens=3))
    outbox.done(Done(task_id="task_1", lease_token="x", outcome="completed"))
    last = outbox.take()
    assert ([used.spent.tokens for used in last.used], len(last.done)) == ([3], 1)
    outbox.acked(Ack(id=last.id))
    assert outbox.settled
