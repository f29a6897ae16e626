"""What the agent has to tell the server: gathered, sent in natural batches, kept until acknowledged. No I/O."""

from typing import Final

import msgspec

from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import Failure, LogLine
from mcp_control.tasks.wire import Ack, Done, Logged, Progress, Report, Started, Used

FRAME_BYTES: Final = 768 * 1024
MAX_LINES: Final = 2000
_ENVELOPE: Final = 300
_ASK: Final = 64 * 1024  # more than a question may have


class Outbox:
    """Reports in the making and on their way.

    Ends of attempts and starts go out at once. Progress, usage and logs alone wait while a report is unacknowledged, so that their rate
    is the rate at which the server takes them; progress and usage are replaced by newer ones, logs are bounded per task.
    """

    __slots__ = (
        "_again",
        "_done",
        "_dropped",
        "_logs",
        "_next",
        "_progress",
        "_started",
        "_unacked",
        "_untold",
        "_used",
    )

    def __init__(self) -> None:
        self._started: dict[str, Started] = {}
        self._progress: dict[str, Progress] = {}
        self._logs: dict[str, tuple[str, list[LogLine]]] = {}
        self._dropped: dict[str, int] = {}
        self._used: dict[str, Used] = {}
        self._done: list[Done] = []
        self._again: list[Report] = []
        self._unacked: dict[int, Report] = {}
        self._untold: dict[str, str] = {}
        self._next = 1

    def started(self, task_id: str, token: str) -> None:
        """An attempt has begun."""
        self._started[task_id] = Started(task_id=task_id, lease_token=token)

    def progress(self, task_id: str, token: str, fraction: float, message: str) -> None:
        """An attempt has come so far."""
        self._progress[task_id] = Progress(task_id=task_id, lease_token=token, fraction=fraction, message=message)

    def used(self, task_id: str, token: str, spent: Spent) -> None:
        """An attempt has used so much in all."""
        self._used[task_id] = Used(task_id=task_id, lease_token=token, spent=spent)

    def log(self, task_id: str, token: str, line: LogLine) -> None:
        """An attempt logged a line. Over 2,000 lines unsent, further ones are counted and left out."""
        held = self._logs.setdefault(task_id, (token, []))[1]
        if len(held) < MAX_LINES:
            held.append(line)
        else:
            self._dropped[task_id] = self._dropped.get(task_id, 0) + 1

    def done(self, item: Done) -> None:
        """An attempt has ended; its start needs no telling any more. What it last said of its progress goes out with its end."""
        self._started.pop(item.task_id, None)
        self._done.append(item)
        self._untold[item.task_id] = item.lease_token

    def forget(self, task_id: str) -> None:
        """The task belongs to somebody else: tell nothing more about it."""
        self._started.pop(task_id, None)
        self._progress.pop(task_id, None)
        self._used.pop(task_id, None)
        self._logs.pop(task_id, None)
        self._dropped.pop(task_id, None)

    @property
    def urgent(self) -> bool:
        """Whether a report should go out now."""
        return bool(
            self._done
            or self._started
            or self._again
            or (not self._unacked and (self._progress or self._logs or self._used))
        )

    @property
    def settled(self) -> bool:
        """Whether every end of an attempt is known to be durable."""
        return not self._untold

    @property
    def untold(self) -> list[str]:
        """Tasks whose end is not known to be durable."""
        return list(self._untold)

    def holds(self, task_id: str, token: str) -> bool:
        """Say whether the end of this very attempt is on its way."""
        return self._untold.get(task_id) == token

    def take(self) -> Report:
        """Return the next report, at most about 768 KiB of it; the rest stays for the next one."""
        if self._again:
            report = msgspec.structs.replace(self._again.pop(0), id=self._next)
            self._unacked[self._next] = report
            self._next += 1
            return report
        if (
            not self._progress
            and not self._logs
            and len(self._done) < 100
            and not any(item.failure is not None or item.ask is not None for item in self._done)
            and sum(len(item.result) for item in self._done) < FRAME_BYTES
        ):
            used = list(self._used.values()) if self._used else []
            report = Report(id=self._next, started=list(self._started.values()), used=used, done=self._done)
            self._done = []
        else:
            report = self._take_bounded()
        self._started = {}
        if self._used:
            self._used = {}
        self._unacked[self._next] = report
        self._next += 1
        return report

    def _take_bounded(self) -> Report:
        room = FRAME_BYTES
        logs: list[Logged] = []
        for task_id, (token, lines) in list(self._logs.items()):
            taken = 0
            for line in lines:
                size = _line_bytes(line)
                if size > room:
                    break
                room -= size
                taken += 1
            kept = lines[taken:]
            if taken:
                sent = lines[:taken]
                if not kept and (dropped := self._dropped.pop(task_id, 0)):
                    sent.append(
                        LogLine(
                            at=sent[-1].at,
                            level="warning",
                            message=f"{dropped} lines left out",
                            attempt=sent[-1].attempt,
                        )
                    )
                logs.append(Logged(task_id=task_id, lease_token=token, lines=sent))
            if kept:
                self._logs[task_id] = (token, kept)
            else:
                del self._logs[task_id]
        count = 0
        for item in self._done:
            if item.task_id in self._logs:
                break  # its lines go first
            size = len(item.result) + _ENVELOPE + (len(item.failure.traceback) * 2 + 4096 if item.failure else 0)
            size += _ASK if item.ask else 0
            if size > room and (count or logs):
                break
            room -= size
            count += 1
        done, self._done = self._done[:count], self._done[count:]
        progress, self._progress = list(self._progress.values()), {}
        return Report(
            id=self._next,
            started=list(self._started.values()),
            progress=progress,
            logs=logs,
            used=list(self._used.values()),
            done=done,
        )

    def acked(self, ack: Ack) -> None:
        """A report is durable, or must be sent again."""
        report = self._unacked.pop(ack.id, None)
        if report is None:
            return
        if ack.retry:
            self._put_back(report)
            return
        for item in report.done:
            self._told(item)

    def _told(self, item: Done) -> None:
        if self._untold.get(item.task_id) == item.lease_token:
            del self._untold[item.task_id]

    def not_understood(self, code: str, detail: str) -> None:
        """The server refused a frame as a whole. It answers in order, so that is the oldest report without an answer.

        Its ends are sent once more one by one, so that one bad result cannot hold up others; one that was alone fails for good.
        """
        if not self._unacked:
            return
        report = self._unacked.pop(min(self._unacked))
        if len(report.done) == 1 and not report.logs and not report.progress:
            (item,) = report.done
            if item.failure is not None and item.failure.code == "result-refused":
                self._told(item)  # nothing simpler could be said
                return
            failure = Failure(error_class="permanent", code="result-refused", message=f"{code}: {detail}"[:2000])
            failed = Done(task_id=item.task_id, lease_token=item.lease_token, outcome="failed", failure=failure)
            self._again.append(Report(id=0, done=[failed]))
        else:
            self._again += [Report(id=0, done=[item]) for item in report.done]

    def resend(self) -> None:
        """The connection was lost: what is not acknowledged goes out again, under new numbers."""
        reports, self._unacked, self._again = [*self._unacked.values(), *self._again], {}, []
        for report in reversed(reports):
            self._put_back(report)

    def _put_back(self, report: Report) -> None:
        ended = {item.task_id for item in self._done} | {item.task_id for item in report.done}
        for start in report.started:
            if start.task_id not in ended:
                self._started.setdefault(start.task_id, start)
        for progress in report.progress:
            self._progress.setdefault(progress.task_id, progress)
        for used in report.used:
            self._used.setdefault(used.task_id, used)
        for logged in report.logs:
            newer = self._logs.get(logged.task_id, ("", []))[1]
            self._logs[logged.task_id] = (logged.lease_token, [*logged.lines, *newer])
        self._done = [*report.done, *self._done]


def _line_bytes(line: LogLine) -> int:
    return len(msgspec.json.encode(line)) + 2
