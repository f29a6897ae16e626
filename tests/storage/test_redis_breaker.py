"""The breaker decides when Redis is left alone; the link and the URL keep what they promise."""

import asyncio
import traceback

import pytest
from msgspec.structs import replace

from mcp_control.kernel.breaker import Breaker, BreakerOpen
from mcp_control.kernel.clock import SystemClock
from mcp_control.storage.redis.connection import connect, disconnect
from mcp_control.storage.redis.link import POLICY, RedisLink, RedisTrouble, breaker
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.databases import RedisServer, free_ports
from tests.storage.redis_clients import linked

SECRET = "hunter/2@#"


def test_three_failures_in_a_row_open_it_and_no_call_is_the_probe() -> None:
    """Redis is left alone after the third, calls are refused whatever the time, and pauses grow from 1 to 5 s."""
    clock = FakeClock()
    around = Breaker("redis", clock, POLICY, chance=lambda: 0.0)
    for _ in range(3):
        assert around.state == "closed"
        around.failed()
    pauses = []
    for _ in range(5):
        pauses.append(around.wait())
        clock.advance(around.wait())
        with pytest.raises(BreakerOpen):
            around.enter()
        around.failed(around.probe())
    assert pauses == [1, 2, 4, 5, 5]
    clock.advance(around.wait())
    around.succeeded(around.probe())
    assert (around.state, around.failures, around.opened, around.refused) == ("closed", 0, 1, 5)


@pytest.mark.parametrize("control", [False, True], ids=["product", "control"])
async def test_three_calls_at_most_wait_for_a_redis_that_hangs(control: bool, redis_server: RedisServer) -> None:
    """Row 19: after three slow calls the others are refused at once; without the breaker every one of them waits (control)."""
    policy = replace(POLICY, failures=100) if control else POLICY
    link = RedisLink(connect(redis_server.url), "n", breaker(SystemClock(), policy), seconds=0.05)
    tried: list[int] = []

    async def ask() -> object:
        tried.append(1)
        return await link.client.get("x")

    try:
        assert await link.call(ask) is None
        tried.clear()
        redis_server.pause()
        for _ in range(10):
            with pytest.raises(RedisTrouble):
                await link.call(ask)
        assert len(tried) == (10 if control else 3)
    finally:
        redis_server.resume()
        await link.close()


async def test_nobody_there_is_trouble_at_once_and_then_refused() -> None:
    """Calls to a port where nobody listens raise RedisTrouble quickly, and after three Redis is left alone."""
    [port] = free_ports(1)
    link = await linked(f"redis://127.0.0.1:{port}", "t", seconds=0.05)
    for _ in range(5):
        with pytest.raises(RedisTrouble):
            await link.call(lambda: link.client.execute_command("GET", "x"))
    assert (link.breaker.state, link.breaker.refused) == ("open", 2)


async def test_a_server_that_is_busy_itself_is_no_fault_of_redis(redis_url: str) -> None:
    """A call during which the event loop stood still for longer than the limit succeeds."""
    link = await linked(redis_url, "t", seconds=0.05)
    loop = asyncio.get_running_loop()

    def stand_still() -> None:
        until = loop.time() + 0.15
        while loop.time() < until:
            sum(range(1000))

    await link.call(lambda: link.client.execute_command("PING"))
    for _ in range(3):
        loop.call_soon(stand_still)
        await link.call(lambda: link.client.execute_command("SET", "k", "v"))
    assert (link.breaker.state, link.breaker.failures) == ("closed", 0)


async def test_a_cancelled_call_is_cancelled_and_no_failure(redis_url: str) -> None:
    """Cancelling ends a call whatever it waits for, is not counted, and the link works on."""
    link = await linked(redis_url, "t")
    for steps in range(12):
        call = asyncio.ensure_future(link.call(lambda: link.client.execute_command("BLPOP", "nothing", 0)))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert (link.breaker.state, link.breaker.failures) == ("closed", 0)
    assert await link.call(lambda: link.client.execute_command("PING")) in (True, b"PONG")


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "rediss://user:pass@host:6380/3?ssl_ca_certs=/etc/ca.pem",
        "redis://[::1]:6379/0",
        "redis+sentinel://one:26379,two/main/2?sentinel_password=x",
        "rediss+sentinel://:p@one,two,three/main",
        "redis+cluster://a:7000,b:7001,c",
        "rediss+cluster://user:p%40ss@a",
    ],
)
async def test_every_form_of_the_url_gives_a_client(url: str) -> None:
    """One server, Sentinel and cluster, with and without TLS and credentials; nothing is sent for it."""
    await disconnect(connect(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://:{0}@host",
        "redis://:{0}@",
        "redis://:{0}@host:port",
        "redis://:{0}@host/name",
        "redis://:{0}@host/0?{0}=1",
        "redis://a:{0}@one,two",
        "redis+sentinel://:{0}@one,two",
        "redis+cluster://:{0}@one:x",
        "{0}",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_showing_it(url: str) -> None:
    """The error says what is wrong and holds no part of the password."""
    with pytest.raises(ValueError, match="Redis URL") as refused:
        connect(url.format(SECRET))
    assert not any(part in "".join(traceback.format_exception(refused.value)) for part in ("hunter", "2@#"))


async def test_credentials_show_neither_in_errors_nor_in_what_is_printed() -> None:
    """Neither the client nor its errors show the password."""
    [port] = free_ports(1)
    for scheme, path in (("redis", ""), ("redis+sentinel", "/service"), ("redis+cluster", "")):
        link = await linked(f"{scheme}://someone:correct-horse@127.0.0.1:{port}{path}", "t", seconds=1)
        with pytest.raises(RedisTrouble) as trouble:
            await link.call(lambda link=link: link.client.execute_command("GET", "x"))  # type: ignore[misc]  # bound now
        shown = "".join(traceback.format_exception(trouble.value)) + repr(link.client) + repr(vars(link))
        assert "correct-horse" not in shown
