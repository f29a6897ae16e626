"""What waits for an agent without a socket until it asks."""

import asyncio
from collections.abc import Sequence

from mcp_control.agents.sessions import Frame, Session
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.wire import Assignment, Cancel, Tasks, Welcome


class PollOutbox:
    """Keeps frames for an agent without a socket until it asks, and assignments until it is heard of that they arrived."""

    def __init__(self) -> None:
        self._frames: list[Frame] = []
        self._given: dict[str, tuple[Assignment, int]] = {}
        self._there = asyncio.Event()

    def send(self, frames: Sequence[Frame]) -> None:
        """Keep frames."""
        self._frames.extend(frames)
        if any(isinstance(frame, Tasks | Cancel) for frame in frames):
            self._there.set()

    def welcome(self) -> Welcome:
        """Return the welcome frame of the session."""
        return next(frame for frame in self._frames if isinstance(frame, Welcome))

    async def claim(
        self, session: Session, dispatcher: Dispatcher, limit: int, seconds: float
    ) -> tuple[list[Assignment], list[str]]:
        """Wait up to so many seconds for at most `limit` tasks; returns them, and ids of tasks to cancel."""
        session.allowance = limit
        session.asked += 1
        session.parted = self._there.set  # another server has the session: ask again, wherever that leads
        dispatcher.freed(session)
        try:
            async with asyncio.timeout(seconds):
                await self._there.wait()
        except TimeoutError:
            pass
        finally:
            session.allowance = 0
        self._there.clear()
        frames, self._frames = self._frames, []
        tasks = [*{task.task_id: task for frame in frames if isinstance(frame, Tasks) for task in frame.tasks}.values()]
        cancel = [task_id for frame in frames if isinstance(frame, Cancel) for task_id in frame.task_ids]
        self._given.update((task.task_id, (task, 0)) for task in tasks)
        return tasks, cancel

    def heard(self, session: Session, running: Sequence[str]) -> None:
        """Learn from a heartbeat what the agent runs; what it holds and does not know of is sent again with its next claim.

        The heartbeat may have left before the answer to the claim arrived, so one that lacks a task is no sign yet; the second one is.
        """
        known = set(running)
        again: list[Assignment] = []
        for task_id, (task, missed) in list(self._given.items()):
            if task_id in known or task_id not in session.held:
                del self._given[task_id]
            elif missed:
                del self._given[task_id]
                again.append(task)
            else:
                self._given[task_id] = (task, missed + 1)
        if again:
            self.send([Tasks(tasks=again)])
