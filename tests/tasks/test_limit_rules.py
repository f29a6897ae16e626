"""The rules of limits, pure: numbers, rates, messages, expressions, and what is refused."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.expressions.programs import ExpressionError
from mcp_control.kernel.errors import Invalid
from mcp_control.tasks.limit_expressions import LimitExpression
from mcp_control.tasks.limit_model import Gate, Hold, Rate, Taken
from mcp_control.tasks.limiting import (
    burst_of,
    free_number,
    gate_name,
    is_over,
    missing,
    new_hold,
    next_free,
    settled,
    window_ms,
)
from mcp_control.tasks.model import FINAL_STATES, Task, TaskSpec, TaskState
from mcp_control.tasks.submission import check

NOW = 1_800_000_000_000
RATES = st.builds(
    Rate,
    count=st.integers(1, 20),
    seconds=st.floats(0.01, 100),
    burst=st.one_of(st.none(), st.integers(1, 20)),
)


@given(rate=RATES, asked=st.lists(st.integers(0, 3000), min_size=1, max_size=50))
def test_starts_never_exceed_burst_and_rate_in_any_time(rate: Rate, asked: list[int]) -> None:
    """Tasks begin whenever a number is free: in any time t there are at most burst + t · rate starts."""
    taken: dict[int, Taken] = {}
    starts: list[int] = []
    now = NOW
    for gap in asked:
        now += gap
        number = free_number(taken, burst_of(rate), now)
        if number is not None:
            taken[number] = Taken(name="r", number=number, until=now + window_ms(rate))
            starts.append(now)
    for first, begun in enumerate(starts):
        for last in range(first, len(starts)):
            seconds = (starts[last] - begun) / 1000
            assert last - first + 1 <= burst_of(rate) + seconds * rate.count / rate.seconds + 1e-6


@given(rate=RATES)
def test_a_rate_that_is_used_is_free_again_after_its_window(rate: Rate) -> None:
    """With all numbers used at once, the first is free exactly a window later, and `next_free` says so."""
    until = NOW + window_ms(rate)
    taken = {number: Taken(name="r", number=number, until=until) for number in range(burst_of(rate))}
    assert free_number(taken, burst_of(rate), until - 1) is None
    assert next_free(taken, NOW) == until
    assert free_number(taken, burst_of(rate), until) == 0


@given(used=st.sets(st.integers(0, 30)), room=st.integers(1, 20))
def test_a_lowered_limit_lets_nobody_in_until_fewer_are_taken(used: set[int], room: int) -> None:
    """A number is given only while fewer than the limit are in use, and it is below the limit."""
    taken = {number: Taken(name="s", number=number, holder="t") for number in used}
    number = free_number(taken, room, NOW)
    assert (number is None) == (len(used) >= room)
    assert number is None or (number < room and number not in used)


def _task(state: TaskState, *holds: Hold, gates: list[Gate] | None = None) -> Task:
    return Task(
        id="task_1", version=1, type="t", state=state, state_at=NOW, created_at=NOW, lane="l", order=1,
        holds=list(holds), gates=gates or [],
    )  # fmt: skip


@pytest.mark.parametrize("state", list(TaskState))
def test_holds_end_with_what_they_are_for(state: TaskState) -> None:
    """A slot lives as long as its attempt, a start until an agent has the task, a singleton until the end; nothing outlives the task."""
    begun = {TaskState.ASSIGNED, TaskState.RUNNING}
    task = _task(state)
    assert is_over(Hold(name="n", ends="attempt"), task) == (state not in {TaskState.BLOCKED, TaskState.QUEUED, *begun})
    assert is_over(Hold(name="n", ends="start"), task) == (state in begun or state in FINAL_STATES)
    assert is_over(Hold(name="n", ends="final"), task) == (state in FINAL_STATES)
    assert is_over(Hold(name="n", ends="due"), task) == (state is not TaskState.SCHEDULED)
    held, writes, deletes, changes = settled(_task(state, Hold(name="n", ends="final", version=1)), 0)
    assert (len(held.holds), len(writes), len(deletes), len(changes)) == (
        (0, 0, 1, 1) if state in FINAL_STATES else (1, 0, 0, 0)
    )


def test_a_start_is_used_up_and_comes_back_later() -> None:
    """A task that is given to an agent in the change that takes its start leaves a number that is free after the window."""
    gate = Gate(key="k", rate=Rate(count=2, seconds=10))
    task, writes, deletes, (change,) = settled(
        _task(TaskState.ASSIGNED, new_hold(gate_name("default", gate), gate, 1, version=4)), 1
    )
    assert (task.holds, deletes) == ([], [])
    assert writes[0].version == 4
    assert change.taken is not None
    assert (change.number, change.taken.until, change.taken.holder) == (1, NOW + 10_000, "")


def test_what_is_missing_comes_in_the_order_of_the_names() -> None:
    """Whatever order the limits are written in, they are taken in one order, so that tasks cannot wait for each other."""
    one, two = Gate(key="a", slots=1), Gate(key="b", slots=1)
    for gates in ([one, two], [two, one]):
        assert [gate for _, gate in missing(_task(TaskState.BLOCKED, gates=gates))] == [one, two]


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"limits": [{"key": "k"}]}, "#/limits/0"),
        ({"limits": [{"key": "", "concurrency": 1}]}, "#/limits/0/key"),
        ({"limits": [{"key": "k", "concurrency": 0}]}, "#/limits/0/concurrency"),
        ({"limits": [{"key": "k", "rate": {"count": 0}}]}, "#/limits/0/rate/count"),
        ({"limits": [{"key": "k", "concurrency": 1, "on_excess": "drop"}]}, "#/limits/0/on_excess"),
        ({"limits": [{"key": "k", "concurrency": 1}] * 2}, "#/limits/1/key"),
        ({"limits": [{"key": f"k{n}", "concurrency": 1} for n in range(9)]}, "#/limits"),
        ({"unique": {"key": ""}}, "#/unique/key"),
        ({"unique": {"key": "k"}, "debounce": {"key": "k", "seconds": 1}}, "#/unique"),
        ({"debounce": {"key": "k", "seconds": 0}}, "#/debounce/seconds"),
        ({"debounce": {"key": "k", "seconds": 9, "max_seconds": 1}}, "#/debounce/max_seconds"),
        ({"debounce": {"key": "k", "seconds": 9}, "idempotency_key": "i"}, "#/idempotency_key"),
    ],
)
def test_what_is_wrong_with_limits_is_said_in_its_place(fields: dict[str, object], pointer: str) -> None:
    """Every mistake has a pointer to where it is."""
    with pytest.raises(Invalid) as wrong:
        check(msgspec.convert({"type": "t", **fields}, TaskSpec), NOW)
    assert pointer in [error.pointer for error in wrong.value.errors]


def test_expressions_see_type_labels_and_payload_and_nothing_else() -> None:
    """They give keys and numbers; macros, unknown names and values of other kinds are refused with a reason."""
    roots = ("type", "labels", "payload")
    values = {"type": "report.pdf", "labels": {"tier": "premium"}}
    key = LimitExpression('type + "-" + string(payload.customer)', roots)
    assert key.text(values, b'{"customer": 7}') == "report.pdf-7"
    assert LimitExpression("payload.n", roots).text(values, b'{"n": 7}') == "7"
    limit = LimitExpression('labels.tier == "premium" ? 10 : 1', roots)
    assert limit.number(values) == 10
    for payload in (b"{}", b'{"customer": null}', b"3"):
        with pytest.raises(ExpressionError):
            LimitExpression("payload.customer", roots).text(values, payload)
    for source in ("", "labels.", "params.a", "payload.all(x, x > 1)", "payload.map(x, x)", "x" * 1001):
        with pytest.raises(ExpressionError):
            LimitExpression(source, roots)
    with pytest.raises(ExpressionError):
        LimitExpression("labels.tier", roots).number(values)
