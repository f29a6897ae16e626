"""Following events: the event-stream format, and what the events of one task mean to somebody who watches it. No I/O."""

from enum import Enum
from typing import Any, Literal

import msgspec

from mcp_control.events.model import Event
from mcp_control.sdk.errors import problem_from
from mcp_control.tasks.model import FINAL_STATES, LogLine, TaskState
from mcp_control.tasks.view_model import TaskView

_decode_event = msgspec.json.Decoder(Event).decode


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """Something about a task: a state it came to, progress, or a log line."""

    kind: Literal["state", "progress", "log"]
    state: TaskState
    progress: float = 0.0
    message: str = ""
    line: LogLine | None = None


class Sign(Enum):
    """What a stream says beside events: it is open, it lives, or events were left out since the reader is too slow."""

    OPEN = "open"
    ALIVE = "alive"
    REREAD = "reread"


class SseReader:
    """Reads an event stream line by line (WHATWG HTML, section 9.2.6)."""

    __slots__ = ("_data", "_kind", "cursor")

    def __init__(self, cursor: str | None = None) -> None:
        self._data: list[str] = []
        self._kind = ""
        self.cursor = cursor

    def feed(self, line: str) -> "Event | Sign | None":
        """Take a line without its end; return the event it completes, or a sign that is none.

        Raises:
            Missing: the events after the cursor are no longer kept.
        """
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._kind = value
            elif name == "id":
                self.cursor = value
            return Sign.ALIVE if not name else None
        kind, self._kind = self._kind, ""
        text, self._data = "\n".join(self._data).encode(), []
        if kind == "reread":
            return Sign.REREAD
        if kind == "problem":
            raise problem_from(410, text)
        if not text:
            return None
        event: Event = _decode_event(text)
        return event


class TaskFollower:
    """Turns a task's views and events into updates, each thing once."""

    def __init__(self) -> None:
        self._seen: tuple[str, float, str] | None = None
        self.state: TaskState | None = None
        self.next_line = 0
        self._ended = False

    def ended(self) -> bool:
        """Say whether the final state was seen."""
        return self._ended

    def viewed(self, view: TaskView) -> list[Update]:
        """The task was read."""
        return self._now(view.state, view.progress, view.progress_message)

    def happened(self, event: Event) -> list[Update]:
        """An event of the task came."""
        data: dict[str, Any] = msgspec.json.decode(event.data) if event.data else {}
        try:
            state = TaskState(data.get("state", self.state or TaskState.QUEUED))
        except ValueError:
            return []
        return self._now(state, float(data.get("progress") or 0.0), str(data.get("message") or ""))

    def lines(self, lines: list[LogLine], following: int) -> list[Update]:
        """Log lines were read; `following` is the number of the next one."""
        self.next_line = following
        state = self.state or TaskState.RUNNING
        return [Update(kind="log", state=state, message=line.message, line=line) for line in lines]

    def _now(self, state: TaskState, progress: float, message: str) -> list[Update]:
        seen = (state.value, progress, message)
        if seen == self._seen or self._ended:
            return []
        self._seen = seen
        kind: Literal["state", "progress"] = "progress" if state is self.state else "state"
        self.state = state
        self._ended = state in FINAL_STATES
        return [
            Update(kind=kind, state=state, progress=1.0 if state is TaskState.COMPLETED else progress, message=message)
        ]
