"""Loops: at their pace, one pass at a time, through errors, and gone when stopped."""

import asyncio

from structlog.testing import capture_logs

from mcp_control.kernel.loops import Wake, every
from mcp_control.testing.clock import FakeClock


class Pace:
    """A sleep that ends when the test says so, and notes how long it was asked to take."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self._waiting: asyncio.Future[None] | None = None
        self._asleep = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked.append(seconds)
        self._waiting = asyncio.get_running_loop().create_future()
        self._asleep.set()
        await self._waiting

    async def step(self) -> None:
        """Let one interval pass, and wait until the loop sleeps again."""
        await self.asleep()
        self._asleep.clear()
        assert self._waiting is not None
        self._waiting.set_result(None)
        await self.asleep()

    async def wake(self) -> None:
        """Let one interval pass."""
        await self.asleep()
        self._asleep.clear()
        assert self._waiting is not None
        self._waiting.set_result(None)

    async def asleep(self) -> None:
        await asyncio.wait_for(self._asleep.wait(), 10)


async def test_each_pass_gets_the_time_and_waits_are_spread() -> None:
    """`once` is called with the clock's now; waits are the interval and up to a tenth more or less."""
    clock, pace, passes = FakeClock(), Pace(), []
    spread = iter([0.0, 0.5, 1.0, 0.5])

    async def once(now: int) -> None:
        passes.append(now)

    loop = every(10, once, name="x", clock=clock, random=lambda: next(spread), sleep=pace.sleep)
    await pace.asleep()
    assert passes == []
    for _ in range(3):
        clock.advance(10)
        await pace.step()
    assert passes == [1_800_000_010_000, 1_800_000_020_000, 1_800_000_030_000]
    assert [round(asked, 6) for asked in pace.asked] == [9, 10, 11, 10]
    assert (loop.passes, loop.failures, loop.finished_at) == (3, 0, clock.now())
    await loop.stop()
    await loop.stop()


async def test_errors_are_logged_slow_it_down_and_do_not_end_it() -> None:
    """A fault that stays makes it wait longer, up to a bound, with one trace; the first success brings the pace back."""
    clock, pace = FakeClock(), Pace()
    faults = [ValueError("no")] * 7

    async def once(now: int) -> None:
        if faults:
            raise faults.pop()

    with capture_logs() as logged:
        loop = every(1, once, name="sweeper", clock=clock, random=lambda: 0.5, sleep=pace.sleep)
        for _ in range(8):
            await pace.step()
        await loop.stop()
    assert pace.asked == [1, 2, 4, 5, 5, 5, 5, 5, 1]
    assert [(entry["event"], entry["loop"], entry["failures"]) for entry in logged] == [
        ("loop-failed", "sweeper", n) for n in range(1, 8)
    ]
    assert [bool(entry["exc_info"]) for entry in logged] == [True] + [False] * 6


async def test_stop_lets_a_pass_finish() -> None:
    """What a pass has begun it ends; afterwards nothing runs."""
    clock, pace = FakeClock(), Pace()
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), []

    async def once(now: int) -> None:
        begun.set()
        await go_on.wait()
        ended.append(now)

    loop = every(1, once, name="x", clock=clock, sleep=pace.sleep)
    await pace.wake()
    await asyncio.wait_for(begun.wait(), 10)
    stopping = asyncio.create_task(loop.stop())
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.wait_for(stopping, 10)
    assert len(ended) == 1
    assert len(pace.asked) == 1


async def test_stop_does_not_wait_for_ever() -> None:
    """A pass that hangs is cancelled when its grace ends."""
    clock, pace = FakeClock(), Pace()
    begun, cancelled = asyncio.Event(), []

    async def once(now: int) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(now)

    loop = every(1, once, name="x", clock=clock, sleep=pace.sleep)
    await pace.wake()
    await asyncio.wait_for(begun.wait(), 10)
    await asyncio.wait_for(loop.stop(grace=0), 10)
    assert len(cancelled) == 1


async def test_a_loop_that_is_woken_is_idle_when_it_has_done_what_it_was_asked() -> None:
    """Not idle from the moment it is set; what is set while it works is one more round, however often; idle after that."""
    wake, rounds, go_on = Wake(), list[int](), asyncio.Semaphore(0)
    worked = asyncio.Event()

    async def work() -> None:
        while True:
            await wake.wait()
            rounds.append(len(rounds))
            worked.set()
            await go_on.acquire()

    async def until_round(count: int) -> None:
        while len(rounds) < count:
            worked.clear()
            await worked.wait()

    loop = asyncio.create_task(work())
    assert wake.idle
    wake.set()
    assert not wake.idle
    async with asyncio.timeout(10):
        await until_round(1)
        assert not wake.idle
        wake.set()
        wake.set()
        go_on.release()
        await until_round(2)
        assert not wake.idle
        go_on.release()
        await asyncio.sleep(0)
    assert wake.idle
    assert rounds == [0, 1]
    loop.cancel()
