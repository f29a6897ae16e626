"""Work in the background: it runs to its end, its errors are seen, and nothing of it outlives its owner."""

import asyncio

from structlog.testing import capture_logs

from mcp_control.kernel.background import Background
from mcp_control.kernel.errors import StoreUnavailable


async def test_what_was_begun_meanwhile_is_waited_for_too() -> None:
    """`idle` returns when nothing is under way, also nothing that work in the background began itself."""
    background, done = Background("x"), list[str]()

    async def inner() -> None:
        await asyncio.sleep(0)
        done.append("inner")

    async def outer() -> None:
        await asyncio.sleep(0)
        background.begin(inner())
        done.append("outer")

    background.begin(outer())
    await background.idle()
    assert done == ["outer", "inner"]


async def test_an_error_is_logged_and_counted_and_ends_nothing_else() -> None:
    """A fault of ours is an error with its trace, a problem a warning with its code; other work goes on."""
    background, done = Background("keeping"), list[str]()

    async def broken() -> None:
        raise RuntimeError("ours")

    async def refused() -> None:
        raise StoreUnavailable("away")

    async def fine() -> None:
        await asyncio.sleep(0)
        done.append("fine")

    with capture_logs() as logs:
        for work in (broken(), refused(), fine()):
            background.begin(work)
        await background.idle()
    assert done == ["fine"]
    assert background.failures == 2
    assert [(log["log_level"], log["work"]) for log in logs] == [("error", "keeping"), ("warning", "keeping")]
    assert logs[1]["code"] == StoreUnavailable("away").code
    assert isinstance(logs[0]["exc_info"], RuntimeError)


async def test_close_cancels_what_is_under_way_and_is_no_failure() -> None:
    """After `close` nothing runs, not even what was begun while it waited; being cancelled is not counted."""
    background = Background("x")
    ended = list[str]()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            background.begin(late())
            ended.append("stubborn")

    async def late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("late")

    task = background.begin(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await background.close()
        await background.close()
    assert task.cancelled()
    assert ended[0] == "stubborn"
    assert background.failures == 0
    assert not [each for each in asyncio.all_tasks() if each.get_name() == "x"]


async def test_close_with_grace_lets_work_end() -> None:
    """What ends within the grace is not cancelled."""
    background, done, gate = Background("x"), list[str](), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.append("work")

    background.begin(work())
    asyncio.get_running_loop().call_soon(gate.set)
    await background.close(grace=10)
    assert done == ["work"]
