"""Overload (promise G12): new work is shed first, what keeps accepted work moving last."""

import asyncio

import httpx2
import pytest

from mcp_control.api.admission import Limits, Load, Weight, admit
from mcp_control.testing.server import RunningServer

LIMITS = Limits(submits=10, waiting=100, lag=0.5)


@pytest.mark.parametrize(
    ("load", "submit", "read", "keep"),
    [
        (Load(), True, True, True),
        (Load(submits=9, waiting=99, lag=0.4), True, True, True),
        (Load(submits=10), False, True, True),
        (Load(waiting=100), False, True, True),
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
