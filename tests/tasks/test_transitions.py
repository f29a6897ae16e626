"""The transition table of tasks, pair by pair and in random histories."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mcp_control.kernel.errors import InvalidTransition
from mcp_control.tasks import asking, gating, transitions
from mcp_control.tasks.ask_model import Ask
from mcp_control.tasks.due import due_at, on_time
from mcp_control.tasks.limit_model import Gate
from mcp_control.tasks.model import FINAL_STATES, HELD_STATES, Failure, Lease, Request, RetryPolicy, Task, TaskState
from mcp_control.tasks.retry import backoff_ms
from mcp_control.tasks.transitions import LOST_LIMIT, TRANSITIONS, allowed_verbs

S = TaskState
NOW = 1_800_000_000_000
GRACE = 20_000
PAIRS = [(verb, state) for verb in TRANSITIONS for state in TaskState]
TEMPORARY = Failure()
PERMANENT = Failure(error_class="permanent", code="bad-input")
CRITICAL = Failure(error_class="critical", code="disk-gone")


def a_task(state: TaskState = S.QUEUED, **fields: Any) -> Task:
    """Build a task in a state, with the lease that state implies."""
    if state in HELD_STATES:
        fields.setdefault("lease", Lease(agent_id="a", instance_id="i", token="t1", since=NOW))
        fields.setdefault("attempt", 1)
        fields.setdefault("epoch", 1)
    if state is S.SCHEDULED:
        fields.setdefault("not_before", NOW)
    return Task(
        id="task_1", version=1, type="echo", state=state, state_at=NOW, created_at=NOW, lane="l", order=1, **fields
    )


def apply(verb: str, task: Task, now: int = NOW + 1, chance: float = 0.5, failure: Failure = TEMPORARY) -> Task:
    """Call the function of a verb."""
    match verb:
        case "assign":
            return transitions.assign(task, "a", "i", f"t{task.epoch + 1}", now)
        case "admit":
            return gating.admit(task, [], now)
        case "fail":
            return transitions.fail(task, failure, now, chance)
        case "ask":
            return asking.ask(task, Ask(key=f"k{task.attempt}", title="Go on?", timeout_seconds=chance or None), now)
        case "lapse":
            return asking.lapse(task, now)
        case "exhaust":
            return transitions.exhaust(task, failure, now, stop=task.retry.max_attempts == 1)
        case _:
            done: Task = getattr(transitions, verb)(task, now)
            return done


@pytest.mark.parametrize(("verb", "state"), PAIRS)
def test_a_verb_follows_the_table_or_is_refused(verb: str, state: TaskState) -> None:
    """Every pair of verb and state ends where the table says, or in InvalidTransition with the state and what is allowed there."""
    rows = TRANSITIONS[verb]
    cancels = (None, Request(at=NOW, by="u", reason="enough"))
    reached = set()
    for cancel in cancels:
        for lost in range(LOST_LIMIT):
            for failure in (TEMPORARY, PERMANENT, CRITICAL):
                for most, gates in ((1, []), (3, []), (3, [Gate(key="k", slots=1)])):
                    task = a_task(state, cancel=cancel, lost=lost, retry=RetryPolicy(max_attempts=most), gates=gates)
                    if state not in rows:
                        with pytest.raises(InvalidTransition) as refused:
                            apply(verb, task, failure=failure)
                        assert refused.value.data == {"state": state.value, "allowed": allowed_verbs(state)}
                        assert verb not in allowed_verbs(state)
                    else:
                        assert verb in allowed_verbs(state)
                        reached.add(apply(verb, task, failure=failure).state)
    assert reached == set(rows.get(state, ()))


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_final_is_final(state: TaskState) -> None:
    """No verb leads on from a final state, nor does time."""
    task = a_task(state, deadline_at=NOW - 1, finished_at=NOW)
    assert allowed_verbs(state) == []
    assert due_at(task, GRACE) is None
    assert on_time(task, NOW + 10**9, 0.5, GRACE) is None


@pytest.mark.parametrize("state", sorted(set(TaskState) - FINAL_STATES))
def test_everything_open_can_end(state: TaskState) -> None:
    """Whatever a task waits for, it can be cancelled and it can expire."""
    assert {"cancel", "expire"} <= set(allowed_verbs(state))


VERBS = st.sampled_from([*TRANSITIONS, "progress", "request_cancel", "time"])
STEPS = st.lists(
    st.tuples(
        VERBS,
        st.integers(0, 40_000),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from([TEMPORARY, TEMPORARY, PERMANENT]),
    ),
    max_size=40,
)


def _step(task: Task, verb: str, now: int, chance: float, failure: Failure) -> Task:
    if verb == "progress":
        return transitions.progress(task, chance * 3 - 1, "on", now)
    if verb == "request_cancel":
        return transitions.request_cancel(task, Request(at=now, by="u"))
    if verb == "time":
        return on_time(task, now, chance, GRACE) or task
    return apply(verb, task, now, chance, failure)


@given(
    steps=STEPS,
    attempts=st.integers(1, 4),
    timeout=st.none() | st.integers(1, 60_000),
    deadline=st.none() | st.integers(NOW, NOW + 400_000),
)
def test_random_histories_keep_every_rule_of_a_task(
    steps: list[tuple[str, int, float, Failure]], attempts: int, timeout: int | None, deadline: int | None
) -> None:
    """Final absorbs, the fence grows with every change of holder, failures and losses are counted right, time and `due_at` agree."""
    policy = RetryPolicy(max_attempts=attempts)
    task = a_task(retry=policy, timeout_ms=timeout, deadline_at=deadline)
    now = NOW
    fences = [(task.generation, task.epoch)]
    for verb, wait, chance, failure in steps:
        now += wait
        due = due_at(task, GRACE)
        moved = on_time(task, now, chance, GRACE)
        assert (moved is not None) == (due is not None and due <= now)
        try:
            after = _step(task, verb, now, chance, failure)
        except InvalidTransition:
            continue
        assert not task.final or after is task
        _holds(task, after, now)
        fence = (after.generation, after.epoch)
        holders = (task.lease and task.lease.token, after.lease and after.lease.token)
        if holders[0] != holders[1] and after.state not in (S.COMPLETED, S.FAILED):
            assert fence > fences[-1]
        assert fence >= fences[-1]
        fences.append(fence)
        task = after


def _holds(task: Task, after: Task, now: int) -> None:
    assert (after.lease is not None) == (after.state in HELD_STATES)
    assert (after.finished_at is not None) == after.final
    assert after.failures <= after.retry.max_attempts
    assert after.failures - task.failures in (0, 1)
    assert 0.0 <= after.progress <= 1.0
    assert after.lost < LOST_LIMIT or after.state in (S.FAILED, S.CANCELLED)
    assert len(after.attempts) - len(task.attempts) == (1 if task.lease and not after.lease else 0)
    if task.cancel is not None and task.lease is not None and after.lease is None:
        assert after.final, "nobody tries again what was to be cancelled"
    if after.state is S.SCHEDULED and task.state in HELD_STATES:
        assert after.not_before is not None
        policy = after.retry
        bound = min(policy.longest_seconds, policy.first_seconds * policy.factor ** (after.failures - 1))
        assert now <= after.not_before <= now + bound * 1000


@given(
    failures=st.integers(1, 10_000),
    chance=st.floats(0, 1, exclude_max=True),
    first=st.floats(0, 86_400),
    factor=st.floats(1, 10),
    longest=st.floats(0, 7 * 86_400),
)
def test_backoff_lies_between_zero_and_its_ceiling(
    failures: int, chance: float, first: float, factor: float, longest: float
) -> None:
    """Full jitter: any wait from 0 to min(first times factor to the n-1, longest), for any number of failures without overflow."""
    policy = RetryPolicy(first_seconds=first, factor=factor, longest_seconds=longest)
    ceiling = min(longest, first * factor ** min(failures - 1, 64))
    wait = backoff_ms(policy, failures, chance)
    assert 0 <= wait <= round(ceiling * 1000)
    assert backoff_ms(policy, failures, 0.0) == 0
    assert wait == round(ceiling * chance * 1000)


@given(seconds=st.floats(-1, 1e9), chance=st.floats(0, 1, exclude_max=True), failures=st.integers(0, 2))
def test_a_failure_that_asks_for_patience_costs_no_attempt(seconds: float, chance: float, failures: int) -> None:
    """However often it happens the task is tried again, not before it was asked for, little later, and within a day and a quarter."""
    task = a_task(retry=RetryPolicy(max_attempts=3), failures=failures)
    for _ in range(5):
        task = apply("fail", apply("assign", task), NOW, chance, Failure(code="breaker-open", retry_after=seconds))
        assert (task.state, task.reason, task.failures) == (S.SCHEDULED, "retrying", failures)
        asked = min(max(seconds, 0), 86_400) * 1000
        assert task.not_before is not None
        assert asked - 1 <= task.not_before - NOW <= asked * 1.25 + 1
        task = apply("promote", task)


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [(Failure(retry_after=1.0), 1), (Failure(retry_after=1.0, error_class="permanent"), 3)],
    ids=["started once", "permanent"],
)
def test_patience_saves_no_task_that_may_not_be_tried_again(failure: Failure, attempts: int) -> None:
    """With one attempt allowed it might have been started, and a permanent error stays one."""
    task = apply("fail", apply("assign", a_task(retry=RetryPolicy(max_attempts=attempts))), failure=failure)
    assert (task.state, task.failures) == (S.FAILED, 1)


def test_a_task_that_may_start_once_is_not_given_out_again() -> None:
    """With one attempt allowed, a lost lease fails the task: it may have been started, and must not be started twice."""
    lost = apply("lose", apply("assign", a_task(retry=RetryPolicy(max_attempts=1))))
    assert (lost.state, lost.reason, lost.lease) == (S.FAILED, "lost", None)
    assert lost.failure is not None
    assert lost.failure.cause == "lost"


def test_three_lost_leases_in_a_row_quarantine_a_task() -> None:
    """The third lease lost in a row fails the task as quarantined; losses cost no attempt."""
    task = a_task()
    for _ in range(LOST_LIMIT):
        assert task.state is S.QUEUED
        task = apply("lose", apply("assign", task))
    assert (task.state, task.reason, task.failures) == (S.FAILED, "quarantined", 0)
    assert task.failure is not None
    assert task.failure.cause == "lost"
    assert [attempt.outcome for attempt in task.attempts] == ["lost"] * 3


@pytest.mark.parametrize("verb", ["fail", "release"])
def test_an_agent_that_answers_ends_a_row_of_losses(verb: str) -> None:
    """Losses count in a row: an attempt that an agent ended by itself sets the count back."""
    task = apply(verb, apply("assign", a_task(lost=2)))
    assert task.lost == 0
    task = replace(task, state=S.QUEUED)
    assert apply("lose", apply("assign", task)).state is S.QUEUED


def test_success_ends_a_row_of_losses() -> None:
    """A completed task remembers no losses and no failure."""
    task = apply("complete", apply("assign", a_task(lost=2, failure=TEMPORARY)))
    assert (task.lost, task.failure, task.progress) == (0, None, 1.0)


def test_attempts_used_up_fail_a_task_and_keep_every_error() -> None:
    """`max_attempts` failures end a task failed, with each attempt and its error kept."""
    task = a_task(retry=RetryPolicy(max_attempts=3))
    for _ in range(2):
        task = apply("fail", apply("start", apply("assign", task)))
        assert (task.state, task.reason) == (S.SCHEDULED, "retrying")
        task = apply("promote", task)
    task = apply("fail", apply("assign", task))
    assert (task.state, task.reason, task.failures, task.attempt) == (S.FAILED, "attempts-exhausted", 3, 3)
    assert [attempt.failure for attempt in task.attempts] == [TEMPORARY] * 3


@pytest.mark.parametrize(("failure", "reason"), [(PERMANENT, "permanent-error"), (CRITICAL, "critical-error")])
def test_only_temporary_errors_are_tried_again(failure: Failure, reason: str) -> None:
    """A permanent or critical error fails the task at its first attempt."""
    task = apply("fail", apply("assign", a_task()), failure=failure)
    assert (task.state, task.reason, task.failures) == (S.FAILED, reason, 1)


def test_cancel_beats_retry() -> None:
    """A held task that was to be cancelled ends cancelled where it would have been tried again, and keeps what went wrong."""
    held = transitions.request_cancel(apply("assign", a_task()), Request(at=NOW, by="u", reason="enough"))
    assert held.state is S.ASSIGNED
    task = apply("fail", held)
    assert (task.state, task.message, task.failure) == (S.CANCELLED, "enough", TEMPORARY)
    assert apply("fail", held, failure=PERMANENT).state is S.FAILED
    assert apply("complete", held).state is S.COMPLETED


def test_a_repeated_cancel_request_keeps_the_first() -> None:
    """Who asked first and when stays on record."""
    first = Request(at=NOW, by="anna")
    held = transitions.request_cancel(apply("assign", a_task()), first)
    assert transitions.request_cancel(held, Request(at=NOW + 5, by="bob")) is held
    assert held.cancel == first


def test_time_settles_ties_in_one_order() -> None:
    """Deadline before forced cancellation before attempt timeout before promotion."""
    late = NOW + 10**6
    held = a_task(S.RUNNING, deadline_at=NOW, timeout_ms=1, cancel=Request(at=NOW, by="u"))
    assert (found := on_time(held, late, 0.5, GRACE)) is not None
    assert found.state is S.EXPIRED
    assert (found := on_time(replace(held, deadline_at=None), late, 0.5, GRACE)) is not None
    assert found.state is S.CANCELLED
    assert (found := on_time(replace(held, deadline_at=None, cancel=None), late, 0.5, GRACE)) is not None
    assert (found.state, found.attempts[-1].outcome) == (S.SCHEDULED, "timeout")
    waiting = a_task(S.SCHEDULED, deadline_at=NOW, not_before=NOW)
    assert (found := on_time(waiting, late, 0.5, GRACE)) is not None
    assert (found.state, found.reason) == (S.EXPIRED, "deadline-never-started")


def test_a_long_history_of_attempts_stays_bounded() -> None:
    """A task that is handed back for ever keeps its first and its newest attempts only."""
    task = a_task()
    for _ in range(60):
        task = apply("release", apply("assign", task))
    assert len(task.attempts) == transitions.KEPT_ATTEMPTS
    last = transitions.KEPT_ATTEMPTS - transitions.FIRST_ATTEMPTS
    kept = [attempt.number for attempt in task.attempts]
    assert kept == [*range(1, transitions.FIRST_ATTEMPTS + 1), *range(task.attempt - last + 1, task.attempt + 1)]
