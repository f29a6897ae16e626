"""Overload (promise G12): new work is shed first, what keeps accepted work moving last."""

import asyncio
from collections import deque
from contextlib import ExitStack

import httpx2
import pytest

from mcp_control.api.admission import Gate, Limits, Load, Turn, Weight, admit
from mcp_control.kernel.errors import Overloaded
from mcp_control.testing.server import RunningServer

LIMITS = Limits(submits=10, waiting=100, lag=0.5)


@pytest.mark.parametrize(
    ("load", "submit", "read", "keep"),
    [
        (Load(), True, True, True),
        (Load(submits=9, waiting=99, lag=0.4), True, True, True),
        (Load(submits=10), False, True, True),
        (Load(waiting=100), False, True, True),
        (Load(entering=99, room=100), True, True, True),
        (Load(entering=100, room=100), False, True, True),
        (Load(lag=0.5), False, True, True),
        (Load(submits=10, waiting=100, lag=2.0), False, False, True),
    ],
)
def test_submits_are_shed_first_and_what_moves_accepted_work_never(
    load: Load, submit: bool, read: bool, keep: bool
) -> None:
    """Submits end where a limit is reached, reads where the loop is four times too late, reports and heartbeats not here."""
    weights: dict[Weight, bool] = {"submit": submit, "read": read, "keep": keep}
    assert {weight: admit(weight, load, LIMITS) is None for weight in weights} == weights


class _Line:
    """A store that commits so many tasks a second, first come first served, behind a gate; time is counted, not waited for."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.now = 0.0
        self.free_at = 0.0
        self.waits: list[float] = []
        self.done = 0
        self.gate = Gate(lambda: 0, lambda _: None, Limits(line=0.5), monotonic=lambda: self.now)
        self._inside: deque[tuple[float, int, float, ExitStack]] = deque()

    def offer(self, at: float, tasks: int) -> None:
        """A submit of so many tasks comes."""
        while self._inside and self._inside[0][0] <= at:
            self.now, done, came, entry = self._inside.popleft()
            entry.close()
            self.done += done
            self.waits.append(self.now - came)
        self.now = at
        entry = ExitStack()
        try:
            self.gate.check("submit")
            entry.enter_context(self.gate.entry(tasks))
        except Overloaded:
            return
        self.free_at = max(self.free_at, at) + tasks / self.rate
        self._inside.append((self.free_at, tasks, at, entry))


@pytest.mark.parametrize("rate", [100.0, 1000.0])
@pytest.mark.parametrize("tasks", [1, 20])
def test_the_line_for_the_store_stays_short_and_the_store_busy(rate: float, tasks: int) -> None:
    """At three times what a store commits, fast or slow, nobody waits a second, and at least nine tenths of what is possible is done."""
    line = _Line(rate)
    for number in range(round(3 * rate / tasks * 60)):
        line.offer(number * tasks / (3 * rate), tasks)
    late = line.waits[len(line.waits) // 2 :]
    assert max(late) <= 1.0
    assert sorted(late)[len(late) // 2] <= 0.6
    assert line.done >= 0.9 * 60 * rate


def test_a_submit_alone_is_never_too_many() -> None:
    """A batch goes in while nothing else does, however slow the store is."""
    line = _Line(10.0)
    for number in range(20):
        line.offer(number * 60.0, 500)
    assert line.done == 19 * 500


def test_a_server_that_just_started_takes_full_batches_of_several_callers() -> None:
    """Three callers with a thousand tasks each are no overload for a store that takes thousands a second."""
    line = _Line(6000.0)
    for number in range(60):
        line.offer(number // 3 * 0.6, 1000)
    line.offer(1000.0, 1)
    assert line.done == 60_000


async def test_large_bodies_leave_others_their_turn() -> None:
    """Of many that would keep the event loop busy, one does so per turn of the loop."""
    turn, did = Turn(), list[str]()

    async def large() -> None:
        async with turn:
            did.append("large")

    async def small() -> None:
        while did.count("large") < 10:
            did.append("small")
            await asyncio.sleep(0)

    await asyncio.gather(*(large() for _ in range(10)), small())
    assert "large,large" not in ",".join(did)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_overloaded_server_refuses_submits_and_answers_the_rest(
    server: RunningServer, client: httpx2.AsyncClient
) -> None:
    """503 overloaded with Retry-After for a submit; health, reads and figures still answer; nothing was changed."""
    gate, before = server.services.gate, server.services.broadcaster.newest
    gate.submits += 100_000
    try:
        refused = await client.post("/api/v1/tasks", json={"type": "echo"})
        others = await asyncio.gather(*[client.get(path) for path in ("/api/v1/tasks", "/health/live", "/metrics")])
    finally:
        gate.submits -= 100_000
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (503, "overloaded", True)
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.status_code for answer in others] == [200, 200, 200]
    assert server.services.broadcaster.newest == before
    assert (await client.post("/api/v1/tasks", json={"type": "echo"})).status_code == 201
