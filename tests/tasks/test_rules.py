"""The pure rules of tasks: retries, lanes, submissions, reports, explanations."""

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_control.agents.matching import Demand
from mcp_control.agents.model import AgentSpec, AgentState, Capability, Resources
from mcp_control.kernel.errors import AlreadyTerminal, IdempotencyKeyInvalid, Invalid, LeaseSuperseded
from mcp_control.tasks.explain import Seen, explain
from mcp_control.tasks.lanes import demand_of, lane_key
from mcp_control.tasks.ledger import Move
from mcp_control.tasks.model import (
    Failure,
    Lease,
    LogLine,
    Needs,
    Origin,
    Request,
    RetryPolicy,
    Task,
    TaskSpec,
    TaskState,
)
from mcp_control.tasks.reports import MESSAGE_MAX, LogCap, Told, deciding, gather
from mcp_control.tasks.retry import may_retry
from mcp_control.tasks.submission import PAYLOAD_MAX, TIMEOUT_MAX, check, digest_of, new_task
from mcp_control.tasks.wire import Done, Logged, Progress, Report, Started

S = TaskState
NOW = 1_800_000_000_000
SOON = datetime.fromtimestamp(NOW / 1000, UTC) + timedelta(hours=1)


def a_task(state: TaskState = S.QUEUED, **fields: Any) -> Task:
    """Build a task."""
    fields = {"lane": "default/echo", "order": 1, "state_at": NOW, "created_at": NOW, "type": "echo"} | fields
    return Task(id="task_1", version=1, state=state, **fields)


# --- retry --------------------------------------------------------------------------------------------------------


@given(
    failures=st.integers(1, 200),
    attempts=st.integers(1, 100),
    error_class=st.sampled_from(["temporary", "permanent", "critical"]),
)
def test_a_retry_needs_a_temporary_error_and_an_attempt_left(failures: int, attempts: int, error_class: Any) -> None:
    """Only temporary errors are tried again, and only while attempts are left."""
    wanted = error_class == "temporary" and failures < attempts
    assert may_retry(RetryPolicy(max_attempts=attempts), failures, Failure(error_class=error_class)) is wanted


# --- lanes --------------------------------------------------------------------------------------------------------


NEEDS = st.builds(
    Needs,
    capabilities=st.dictionaries(st.sampled_from(["gpu", "ocr"]), st.sampled_from(["*", "2", ">=1"]), max_size=2),
    labels=st.dictionaries(st.sampled_from(["zone", "tier"]), st.sampled_from(["a", "b"]), max_size=2),
    resources=st.builds(Resources, cpu=st.sampled_from([0.0, 2.0]), memory_mb=st.sampled_from([0, 512])),
    agent=st.none() | st.sampled_from(["w1", "w2"]),
)
ASKED = st.tuples(
    st.sampled_from(["default", "other"]), st.sampled_from(["echo", "sum"]), st.sampled_from(["*", "2"]), NEEDS
)


@given(one=ASKED, two=ASKED)
def test_tasks_share_a_lane_exactly_when_they_ask_the_same(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    """Equal tenant, type, version range and needs make one lane; any difference makes two."""
    assert (lane_key(*one) == lane_key(*two)) is (one == two)


def test_a_lane_does_not_depend_on_the_order_of_labels() -> None:
    """The same labels written in another order lead to the same lane."""
    one = lane_key("default", "echo", "*", Needs(labels={"a": "1", "b": "2"}))
    assert one == lane_key("default", "echo", "*", Needs(labels={"b": "2", "a": "1"}))


def test_a_lane_asks_what_its_tasks_need() -> None:
    """Nothing a task needs is lost on the way to matching."""
    needs = Needs(capabilities={"gpu": ">=2"}, labels={"zone": "a"}, resources=Resources(cpu=2.0), agent="w1")
    assert demand_of(a_task(type_version="3", needs=needs)) == Demand(
        type="echo",
        type_version="3",
        capabilities={"gpu": ">=2"},
        labels={"zone": "a"},
        resources=Resources(cpu=2.0),
        agent="w1",
    )


# --- submission ---------------------------------------------------------------------------------------------------


BAD = [
    ({"type": ""}, "out-of-range", "#/type"),
    ({"type": "x" * 129}, "limit-exceeded", "#/type"),
    ({"type": "a\nb"}, "invalid-character", "#/type"),
    ({"type": "\u202eevil"}, "invalid-character", "#/type"),
    ({"type": "<script>"}, "invalid-character", "#/type"),
    ({"type_version": "one"}, "invalid-version", "#/type_version"),
    ({"priority": -1}, "out-of-range", "#/priority"),
    ({"priority": 101}, "out-of-range", "#/priority"),
    ({"priority": "urgent"}, "out-of-range", "#/priority"),
    ({"labels": {f"l{n}": "" for n in range(65)}}, "limit-exceeded", "#/labels"),
    ({"labels": {"a": "x" * 256}}, "limit-exceeded", "#/labels/a"),
    ({"labels": {"a": "x\x00"}}, "invalid-character", "#/labels/a"),
    ({"labels": {"a/b": "\x1b[31m"}}, "invalid-character", "#/labels/a~1b"),
    ({"needs": {"labels": {"$x": "y"}}}, "invalid-character", "#/needs/labels/$x"),
    ({"needs": {"capabilities": {f"c{n}": "*" for n in range(65)}}}, "limit-exceeded", "#/needs/capabilities"),
    ({"needs": {"capabilities": {"gpu": "~"}}}, "invalid-version", "#/needs/capabilities"),
    ({"needs": {"agent": ""}}, "out-of-range", "#/needs/agent"),
    ({"needs": {"resources": {"cpu": -1}}}, "out-of-range", "#/needs/resources/cpu"),
    ({"needs": {"resources": {"memory_mb": 2_000_000_000}}}, "out-of-range", "#/needs/resources/memory_mb"),
    ({"needs": {"resources": {"gpu": -1}}}, "out-of-range", "#/needs/resources/gpu"),
    ({"retry": {"max_attempts": 0}}, "out-of-range", "#/retry/max_attempts"),
    ({"retry": {"max_attempts": 101}}, "out-of-range", "#/retry/max_attempts"),
    ({"retry": {"first_seconds": -1}}, "out-of-range", "#/retry/first_seconds"),
    ({"retry": {"factor": 0.5}}, "out-of-range", "#/retry/factor"),
    ({"retry": {"longest_seconds": 1e9}}, "out-of-range", "#/retry/longest_seconds"),
    ({"timeout": 0}, "out-of-range", "#/timeout"),
    ({"timeout": -5}, "out-of-range", "#/timeout"),
    ({"timeout": TIMEOUT_MAX + 1}, "out-of-range", "#/timeout"),
    ({"run_at": SOON.replace(tzinfo=None)}, "invalid-timestamp", "#/run_at"),
    ({"run_at": datetime(1, 1, 1, tzinfo=UTC)}, "invalid-timestamp", "#/run_at"),
    ({"run_at": datetime(9999, 12, 31, tzinfo=UTC)}, "invalid-timestamp", "#/run_at"),
    ({"run_at": SOON + timedelta(days=11 * 366)}, "invalid-timestamp", "#/run_at"),
    ({"deadline": SOON.replace(tzinfo=None)}, "invalid-timestamp", "#/deadline"),
    ({"deadline": SOON - timedelta(hours=2)}, "out-of-range", "#/deadline"),
    ({"context_id": "x" * 129}, "limit-exceeded", "#/context_id"),
    ({"parent_id": "a\u200bb"}, "invalid-character", "#/parent_id"),
    ({"payload": msgspec.Raw(b'"' + b"x" * PAYLOAD_MAX + b'"')}, "payload-too-large", "#/payload"),
]


@pytest.mark.parametrize(("fields", "code", "pointer"), BAD)
def test_bad_submissions_are_refused_at_their_place(fields: dict[str, Any], code: str, pointer: str) -> None:
    """What is wrong with a submission is told by a stable code and a pointer to the place."""
    spec = _spec(fields)
    with pytest.raises(Invalid) as refused:
        check(spec, NOW)
    assert [(error.code, error.pointer) for error in refused.value.errors] == [(code, pointer)]


def _spec(fields: dict[str, Any]) -> TaskSpec:
    made = {
        name: msgspec.convert(value, kind)
        for name, kind in (("needs", Needs), ("retry", RetryPolicy))
        if (value := fields.get(name)) is not None
    }
    return TaskSpec(**{"type": "echo"} | fields | made)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "käse", "a\n", "\x7f"])
def test_bad_idempotency_keys_are_refused(key: str) -> None:
    """A key is 1 to 255 printable ASCII characters without blanks."""
    with pytest.raises(IdempotencyKeyInvalid):
        check(TaskSpec(type="echo", idempotency_key=key), NOW)


def test_everything_wrong_is_told_at_once() -> None:
    """All faults of a submission come in one answer, at most fifty."""
    with pytest.raises(Invalid) as refused:
        check(TaskSpec(type="", priority=101, timeout=0, retry=RetryPolicy(factor=0)), NOW)
    assert [error.pointer for error in refused.value.errors] == ["#/type", "#/priority", "#/retry/factor", "#/timeout"]
    many = {f"l{n}": "\x00" for n in range(60)}
    with pytest.raises(Invalid) as refused:
        check(TaskSpec(type="echo", labels=many), NOW)
    assert len(refused.value.errors) == 50


def test_the_limits_themselves_are_accepted() -> None:
    """Each bound belongs to what is allowed."""
    check(
        TaskSpec(
            type="x" * 128,
            type_version=">=1.2,<2",
            priority=100,
            labels={f"l{n}": "x" * 255 for n in range(64)},
            retry=RetryPolicy(max_attempts=100, first_seconds=86_400, factor=10, longest_seconds=7 * 86_400),
            timeout=TIMEOUT_MAX,
            run_at=SOON - timedelta(days=400),
            deadline=SOON,
            idempotency_key="x" * 255,
            payload=msgspec.Raw(b'"' + b"x" * (PAYLOAD_MAX - 2) + b'"'),
        ),
        NOW,
    )


@pytest.mark.parametrize(("word", "number"), [("critical", 90), ("high", 70), ("medium", 50), ("low", 30)])
def test_priority_words_mean_numbers(word: str, number: int) -> None:
    """critical, high, medium and low are 90, 70, 50 and 30."""
    assert _new(TaskSpec(type="echo", priority=word)).priority == number


def _new(spec: TaskSpec) -> Task:
    return new_task(spec, task_id="task_1", tenant="default", origin=Origin(), now=NOW, order=7)


def test_a_task_begins_queued_or_scheduled() -> None:
    """A start time ahead makes it scheduled; one in the past or none makes it queued."""
    assert _new(TaskSpec(type="echo")).state is S.QUEUED
    later = _new(TaskSpec(type="echo", run_at=SOON))
    assert (later.state, later.not_before, later.reason) == (S.SCHEDULED, NOW + 3_600_000, "not-before")
    past = _new(TaskSpec(type="echo", run_at=SOON - timedelta(days=1)))
    assert (past.state, past.not_before) == (S.QUEUED, None)


def test_a_submission_equals_itself_and_nothing_else() -> None:
    """The digest leaves out the key and the order of labels, and takes in everything else."""
    spec = TaskSpec(type="echo", payload=msgspec.Raw(b"[1]"), labels={"a": "1", "b": "2"}, idempotency_key="k")
    same = TaskSpec(type="echo", payload=msgspec.Raw(b"[1]"), labels={"b": "2", "a": "1"}, idempotency_key="other")
    assert digest_of(spec) == digest_of(same)
    for change in (
        {"payload": msgspec.Raw(b"[2]")},
        {"priority": 51},
        {"labels": {}},
        {"timeout": 5.0},
        {"type": "sum"},
    ):
        assert digest_of(msgspec.structs.replace(spec, **change)) != digest_of(spec)


# --- reports ------------------------------------------------------------------------------------------------------


LEASE = Lease(agent_id="a", instance_id="i", token="live", since=NOW)


def held(state: TaskState = S.ASSIGNED, **fields: Any) -> Task:
    """Build a task that instance `i` holds."""
    return a_task(state, lease=LEASE, attempt=1, epoch=1, **fields)


def told(token: str = "live", **fields: Any) -> Told:
    """Build what a report says of the task."""
    return Told(token, **fields)


def decide(task: Task, said: Told) -> Move | None:
    """Decide with a fixed chance."""
    return deciding(said, "a", NOW + 10, lambda: 0.5)(task)


def done(outcome: Any = "completed", result: bytes = b"1", failure: Failure | None = None, token: str = "live") -> Done:
    """Build the end of an attempt."""
    return Done(task_id="task_1", lease_token=token, outcome=outcome, result=msgspec.Raw(result), failure=failure)


def moved(task: Task, said: Told) -> Move:
    """Decide on something that must change the task."""
    move = decide(task, said)
    assert move is not None
    return move


ENDS = [
    (done(), S.COMPLETED),
    (done("failed", failure=Failure(error_class="permanent", code="bad")), S.FAILED),
    (done("cancelled"), S.CANCELLED),
]


@pytest.mark.parametrize(("end", "state"), ENDS)
def test_the_same_result_again_is_accepted_and_changes_nothing(end: Done, state: TaskState) -> None:
    """A report sent twice because its answer was lost has one effect and no refusal."""
    move = moved(held(S.RUNNING), told(done=end))
    assert move.after.state is state
    assert decide(move.after, told(done=end)) is None
    assert decide(move.after, told(progress=Progress(task_id="task_1", lease_token="live", fraction=0.5))) is None


def test_a_release_that_cancelled_is_recognised_when_repeated() -> None:
    """What an attempt reported need not be the state it led to."""
    asked = held(cancel=Request(at=NOW, by="u"))
    for end in (done("released"), done("failed", failure=Failure())):
        move = moved(asked, told(done=end))
        assert move.after.state is S.CANCELLED
        assert [fact.type for fact in move.facts] == ["task.cancelled"]
        assert decide(move.after, told(done=end)) is None


@pytest.mark.parametrize(
    "other", [done(result=b"2"), done("failed", failure=Failure()), done("cancelled"), done("released")]
)
def test_a_different_result_for_a_final_task_is_already_terminal(other: Done) -> None:
    """One accepted terminal result: the first one stays."""
    after = moved(held(S.RUNNING), told(done=done())).after
    with pytest.raises(AlreadyTerminal) as refused:
        decide(after, told(done=other))
    assert refused.value.data == {"state": "completed"}


@pytest.mark.parametrize("token", ["stale", "", "lïve"])
@pytest.mark.parametrize(
    "task",
    [a_task(), held(), held(S.RUNNING), a_task(S.COMPLETED, last_lease=LEASE), a_task(S.CANCELLED)],
    ids=lambda task: task.state.value,
)
def test_a_stale_lease_is_superseded_whatever_it_says(task: Task, token: str) -> None:
    """A report under a lease that is not the live one changes nothing and tells no holder."""
    says: list[dict[str, Any]] = [
        {"started": True},
        {"progress": Progress(task_id="task_1", lease_token=token, fraction=0.5)},
        {"lines": [LogLine(at=NOW, message="x")]},
        {"done": done(token=token)},
    ]
    for said in says:
        with pytest.raises(LeaseSuperseded) as refused:
            decide(task, told(token, **said))
        assert refused.value.data == {}


def test_one_report_says_everything_of_a_task_in_one_move() -> None:
    """Started, progress, lines and end of one report are one change, with one fact per transition."""
    report = Report(
        id=1,
        started=[Started(task_id="task_1", lease_token="live")],
        progress=[Progress(task_id="task_1", lease_token="live", fraction=0.5, message="half")],
        logs=[Logged(task_id="task_1", lease_token="live", lines=[LogLine(at=NOW, message=m)]) for m in ("a", "b")],
        done=[done()],
    )
    (((task_id, _), said),) = gather(report).items()
    move = moved(held(), said)
    assert (task_id, move.after.state, move.result) == ("task_1", S.COMPLETED, b"1")
    assert [line.message for line in move.lines] == ["a", "b"]
    assert [fact.type for fact in move.facts] == ["task.started", "task.progressed", "task.logged", "task.completed"]
    assert (move.after.progress_message, move.after.started_at) == ("half", held().state_at)


def test_leases_of_one_task_are_kept_apart_in_one_report() -> None:
    """The end of an old attempt and the start of the next do not mix."""
    report = Report(id=1, started=[Started(task_id="task_1", lease_token="live")], done=[done(token="old")])
    new, old = gather(report).values()
    assert (old.lease_token, old.started, new.lease_token, new.done) == ("old", False, "live", None)


def test_progress_of_an_unstarted_task_starts_it() -> None:
    """An attempt that makes progress has begun, and both facts are told."""
    move = moved(held(), told(progress=Progress(task_id="task_1", lease_token="live", fraction=7.0, message="a\nb")))
    assert (move.after.state, move.after.progress, move.after.progress_message) == (S.RUNNING, 1.0, "a\\u000ab")
    assert [fact.type for fact in move.facts] == ["task.started", "task.progressed"]


def test_a_start_told_twice_changes_nothing() -> None:
    """Repeating that work has begun is no transition."""
    assert decide(held(S.RUNNING), told(started=True)) is None


def test_logs_are_cut_off_and_say_so() -> None:
    """Of a log so many lines are kept; the last one kept tells that there were more, and what is dropped is counted."""
    lines = [LogLine(at=NOW, message="x" * 9000)] * 5
    move = moved(held(log_lines=LogCap().lines - 3), told(lines=lines))
    assert [line.level for line in move.lines] == ["info", "info", "warning"]
    assert len(move.lines[0].message) == MESSAGE_MAX
    assert move.lines[-1].message == f"log cut off after {LogCap().lines - 1} lines"
    assert move.after.log_dropped == 3
    full = moved(held(log_lines=LogCap().lines), told(lines=lines))
    assert (list(full.lines), full.after.log_dropped, full.facts) == ([], 5, [])


@given(
    reports=st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=8),
    most_lines=st.integers(1, 12),
    most_bytes=st.integers(1, 200),
)
def test_a_log_keeps_no_more_than_its_cap_and_counts_every_line(
    reports: list[list[int]], most_lines: int, most_bytes: int
) -> None:
    """Whatever the reports: lines and bytes stay within the cap, one notice is the last line, and kept and dropped are all there were."""
    cap = LogCap(most_lines, most_bytes)
    task = held(S.RUNNING)
    kept: list[LogLine] = []
    for sizes in reports:
        said = told(lines=[LogLine(at=NOW, message="x" * size) for size in sizes])
        move = deciding(said, "a", NOW, lambda: 0.5, cap)(task)
        if move is not None:
            kept += move.lines
            task = msgspec.structs.replace(move.after, log_lines=move.after.log_lines + len(move.lines))
    notices = [line for line in kept if line.level == "warning"]
    assert len(kept) == task.log_lines <= most_lines
    assert sum(len(line.message) for line in kept if line.level == "info") == task.log_bytes <= most_bytes
    assert len(kept) - len(notices) + task.log_dropped == sum(map(len, reports))
    assert notices == kept[len(kept) - len(notices) :]
    assert len(notices) == (task.log_dropped > 0)


def test_a_failure_is_bounded_and_visible() -> None:
    """What an agent tells of an error cannot hide anything nor grow without bound."""
    told_failure = Failure(error_class="permanent", code="\x1b[31m" * 50, message="m" * 9999, traceback="t" * 99_999)
    failure = moved(held(), told(done=done("failed", failure=told_failure))).after.failure
    assert failure is not None
    assert failure.code.startswith("\\u001b[31m")
    assert (len(failure.code), len(failure.message), len(failure.traceback)) == (64, MESSAGE_MAX, 32_000)


# --- explain ------------------------------------------------------------------------------------------------------


ECHO = AgentSpec(name="w", capabilities=[Capability(name="echo")])
DEMAND = Demand(type="echo")


def seen(state: AgentState = AgentState.ONLINE, free: int = 1, spec: AgentSpec = ECHO) -> Seen:
    """Build what the scheduler sees of an agent."""
    return Seen(f"agent_{spec.name}", spec, state, free, NOW - 5000)


REASONS: list[tuple[Task, list[Seen], int | None, str, list[str]]] = [
    (a_task(S.COMPLETED), [], None, "finished", []),
    (held(S.RUNNING), [], None, "running", ["a", "i"]),
    (held(), [], None, "assigned", ["a", "i"]),
    (a_task(S.SCHEDULED, not_before=NOW + 1000), [], None, "scheduled", []),
    (a_task(S.SCHEDULED, not_before=NOW + 1000, reason="retrying"), [], None, "retry-backoff", []),
    (a_task(S.BLOCKED, reason="limit-full", message="waits"), [], None, "limit-full", []),
    (a_task(S.INPUT_REQUIRED), [], None, "input-required", []),
    (a_task(), [], 0, "no-capable-agent", []),
    (a_task(), [seen(spec=AgentSpec(name="w"))], 0, "no-capable-agent", []),
    (a_task(), [seen(AgentState.OFFLINE, 0), seen(AgentState.DRAINING, 0)], 0, "agents-unavailable", ["agent_w"] * 2),
    (a_task(), [seen(AgentState.QUARANTINED, 0)], 0, "agents-unavailable", ["agent_w"]),
    (a_task(), [seen(AgentState.STALLED, 0)], 0, "agents-unavailable", ["agent_w"]),
    (a_task(), [seen(AgentState.BUSY, 0), seen(AgentState.OFFLINE, 0)], 3, "agents-full", ["agent_w"]),
    (a_task(), [seen()], 4, "waiting-turn", []),
    (a_task(), [seen()], 0, "next", []),
    (a_task(), [seen()], None, "next", []),
]


@pytest.mark.parametrize(("task", "agents", "ahead", "code", "held_by"), REASONS)
def test_explain_tells_the_first_reason(
    task: Task, agents: list[Seen], ahead: int | None, code: str, held_by: list[str]
) -> None:
    """The first reason in the order the scheduler looks, with who holds the task and what is ahead."""
    found = explain(task, DEMAND, agents, ahead)
    assert (found.code, found.held_by, found.state) == (code, held_by, task.state)
    assert found.message
    if task.state is S.QUEUED:
        assert found.ahead == ahead
    if task.not_before is not None:
        assert found.expected_start == datetime.fromtimestamp(task.not_before / 1000, UTC)


def test_explain_says_what_agents_lack() -> None:
    """Where nobody can take a task, the answer says what is missing."""
    found = explain(a_task(), Demand(type="echo", labels={"zone": "a"}), [seen()], 0)
    assert "w label zone is not a" in found.message
