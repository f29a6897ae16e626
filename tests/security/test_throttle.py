"""Failed logins: the counters, on every server of a store."""

import asyncio
from random import Random

import pytest

from mcp_control.kernel.errors import InvalidToken, Problem, RateLimited, StoreUnavailable
from mcp_control.security.throttle import DEFAULT, LoginThrottle, one_more, wait_of
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.faulty_store import FaultyStore
from tests.security.world import GOOD, Server

HERE = "127.0.0.1"
HOUR_MS = 3_600_000


async def test_stuffing_many_accounts_and_guessing_from_many_places_slow_down_too(store: SqliteStore) -> None:
    """The wide counters: by address over all accounts, by account over all addresses; at most a minute, so nobody is locked out."""
    throttle = LoginThrottle(store)
    for n in range(DEFAULT[2].free):
        await throttle.attempt(f"user{n}", "10.0.0.1", 0)
    with pytest.raises(RateLimited):
        await throttle.attempt("one more", "10.0.0.1", 0)
    for n in range(DEFAULT[1].free):
        await throttle.attempt("admin", f"10.1.0.{n}", 0)
    for n in range(100):
        with pytest.raises(RateLimited) as caught:
            await throttle.attempt("admin", "192.168.0.1", n * 60_000)
        assert caught.value.retry_after is not None
        assert caught.value.retry_after <= 60
        await throttle.attempt("admin", f"10.2.0.{n}", n * 60_000 + 59_999 + 1)


async def test_guesses_at_two_servers_count_together(server: Server) -> None:
    """Failures at one server slow the others down, a restart forgets none, and a login anywhere clears them everywhere."""
    await server.administrator()
    other = Server(server.store, server.clock)
    for each in (server, other, server, other, server):
        with pytest.raises(InvalidToken):
            await each.accounts.login("admin", "guess", "10.0.0.1")
    for each in (server, other, Server(server.store, server.clock)):
        with pytest.raises(RateLimited):
            await each.accounts.login("admin", GOOD, "10.0.0.1")
    server.clock.advance(1)
    await other.accounts.login("admin", GOOD, "10.0.0.1")
    for _ in range(5):
        with pytest.raises(InvalidToken):
            await server.accounts.login("admin", "guess", "10.0.0.1")


async def test_guesses_at_several_servers_at_once_do_not_slip_through(server: Server) -> None:
    """Of forty at once on four servers exactly the free five are checked."""
    await server.administrator()
    servers = [server, *(Server(server.store, server.clock) for _ in range(3))]
    outcomes = await asyncio.gather(
        *[each.accounts.login("admin", f"guess {n}", "10.0.0.1") for n in range(10) for each in servers],
        return_exceptions=True,
    )
    assert sum(isinstance(outcome, InvalidToken) for outcome in outcomes) == 5
    assert sum(isinstance(outcome, RateLimited) for outcome in outcomes) == 35


async def test_an_address_is_not_charged_for_logins_that_succeed(server: Server) -> None:
    """Hundreds of people behind one address log in at once, and none is kept waiting."""
    await server.administrator()
    throttle = LoginThrottle(server.store)

    async def visit(n: int) -> None:
        await throttle.attempt(f"user{n}", HERE, server.clock.now())
        await throttle.succeeded(f"user{n}", HERE)

    for _ in range(3):
        await asyncio.gather(*map(visit, range(DEFAULT[2].free - 1)))


async def test_nobody_logs_in_while_failures_cannot_be_counted(store: SqliteStore, clock: FakeClock) -> None:
    """Without the store the right password is refused with 503 as well, before anything is checked."""
    server = Server(store, clock)
    await server.administrator()
    server.accounts._throttle = LoginThrottle(FaultyStore(store, {"unavailable": 1.0}, Random(1)))
    with pytest.raises(StoreUnavailable) as caught:
        await server.accounts.login("admin", GOOD, HERE)
    assert isinstance(caught.value, Problem)
    assert caught.value.status == 503


async def test_counters_end_with_an_hour_of_peace(store: SqliteStore) -> None:
    """Then they count from nothing, and the sweep removes them; one that is in use stays."""
    throttle = LoginThrottle(store)
    for n in range(600):
        await throttle.attempt(f"user{n}", f"10.{n // 250}.0.{n % 250}", 0)
    for _ in range(5):
        await throttle.attempt("admin", HERE, 0)
    with pytest.raises(RateLimited):
        await throttle.attempt("admin", HERE, 0)
    assert await throttle.once(HOUR_MS) == 0
    await throttle.attempt("admin", HERE, HOUR_MS + 1000)
    assert await throttle.once(HOUR_MS + 1001) == 3 * 600
    assert await store.count("login_failures", [], 1000) == 3
    for _ in range(4):
        await throttle.attempt("admin", HERE, HOUR_MS + 1000)
    with pytest.raises(RateLimited):
        await throttle.attempt("admin", HERE, HOUR_MS + 1000)


def test_a_clock_that_was_set_back_keeps_nobody_out() -> None:
    """A wait is never longer than the longest one of its counter, however far the clock went back."""
    count = None
    for _ in range(DEFAULT[0].free + 3):
        count = one_more(count, "failures_1", DEFAULT[0], 10 * HOUR_MS)
    assert count is not None
    assert wait_of(count, DEFAULT[0], 10 * HOUR_MS) == 8_000
    assert wait_of(count, DEFAULT[0], 0) == DEFAULT[0].longest_ms
