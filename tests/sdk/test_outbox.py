"""What an agent has to tell, without any I/O: batches, bounds, acknowledgements."""

import msgspec

from mcp_control.sdk.runtime.outbox import FRAME_BYTES, MAX_LINES, Outbox
from mcp_control.tasks.model import Failure, LogLine
from mcp_control.tasks.wire import Ack, Done, encode_frame


def done(number: int, result: bytes = b"null", failure: Failure | None = None) -> Done:
    return Done(
        task_id=f"task_{number}",
        lease_token="t",
        outcome="failed" if failure else "completed",
        result=msgspec.Raw(result),
        failure=failure,
    )


def test_progress_waits_for_the_acknowledgement_of_the_last_report() -> None:
    """Progress goes out at once when nothing is on its way, and else with the newest figures when the server has answered."""
    outbox = Outbox()
    outbox.progress("task_1", "t", 0.1, "one")
    first = outbox.take()
    outbox.progress("task_1", "t", 0.2, "two")
    outbox.progress("task_1", "t", 0.3, "three")
    assert not outbox.urgent
    outbox.acked(Ack(id=first.id))
    assert outbox.urgent
    assert [(p.fraction, p.message) for p in outbox.take().progress] == [(0.3, "three")]


def test_the_last_progress_goes_out_with_the_end() -> None:
    """What an attempt says of its progress just before its end is told, though an earlier report is unanswered or sent again."""
    outbox = Outbox()
    outbox.progress("task_1", "t", 0.1, "one")
    outbox.take()
    outbox.progress("task_1", "t", 0.9, "last")
    outbox.done(done(1))
    report = outbox.take()
    assert ([p.message for p in report.progress], [item.task_id for item in report.done]) == (["last"], ["task_1"])
    outbox.resend()
    again = outbox.take()
    assert ([p.message for p in again.progress], again.done) == (["last"], report.done)


def test_an_end_goes_out_at_once_with_all_its_lines() -> None:
    """The end of an attempt does not wait for acknowledgements, and its log lines are in the same or an earlier report."""
    outbox = Outbox()
    outbox.started("task_1", "t")
    outbox.take()
    outbox.log("task_1", "t", LogLine(at=1, message="last words"))
    outbox.done(done(1))
    assert outbox.urgent
    report = outbox.take()
    assert [line.message for logged in report.logs for line in logged.lines] == ["last words"]
    assert [item.task_id for item in report.done] == ["task_1"]


def test_reports_fit_their_frame() -> None:
    """Big results, tracebacks and logs are spread over frames of less than 1 MiB, in order and without loss."""
    outbox = Outbox()
    failure = Failure(message="m" * 2000, traceback="\n" * 16_000)
    for number in range(300):
        outbox.done(done(number, b'"' + b"x" * 20_000 + b'"') if number % 2 else done(number, failure=failure))
    outbox.done(done(300, b'"' + b"x" * FRAME_BYTES + b'"'))
    for number in range(1000):
        outbox.log("task_999", "t", LogLine(at=number, message="y" * 2000))
    ends, lines = [], []
    while outbox.urgent or outbox._logs:
        report = outbox.take()
        assert len(encode_frame(report)) < 1 << 20
        ends += [item.task_id for item in report.done]
        lines += [line.at for logged in report.logs for line in logged.lines]
    assert ends == [f"task_{number}" for number in range(301)]
    assert lines == list(range(1000))


def test_too_many_lines_are_counted_and_left_out() -> None:
    """Beyond the bound further lines are not kept, and people read how many are missing."""
    outbox = Outbox()
    for number in range(MAX_LINES + 7):
        outbox.log("task_1", "t", LogLine(at=number, message="m"))
    (logged,) = outbox.take().logs
    assert len(logged.lines) == MAX_LINES + 1
    assert logged.lines[-1].message == "7 lines left out"


def test_what_is_not_acknowledged_is_told_again() -> None:
    """After a lost connection ends, starts and lines go out again once, and nothing counts as told before its acknowledgement."""
    outbox = Outbox()
    outbox.started("task_2", "t")
    outbox.log("task_1", "t", LogLine(at=1, message="a"))
    outbox.done(done(1))
    lost = outbox.take()
    assert outbox.untold == ["task_1"]
    assert outbox.holds("task_1", "t")
    assert not outbox.holds("task_1", "another lease")
    outbox.resend()
    again = outbox.take()
    assert (again.done, again.started, again.logs) == (lost.done, lost.started, lost.logs)
    outbox.acked(Ack(id=again.id, retry=True))
    assert not outbox.settled
    outbox.acked(Ack(id=outbox.take().id))
    assert outbox.settled
    assert not outbox.urgent


def test_a_task_that_is_gone_is_not_told_of() -> None:
    """What was gathered about a task of somebody else is dropped."""
    outbox = Outbox()
    outbox.started("task_1", "t")
    outbox.progress("task_1", "t", 0.5, "")
    outbox.log("task_1", "t", LogLine(at=1, message="a"))
    outbox.forget("task_1")
    assert not outbox.urgent
