"""Natural batching: what arrives while one batch is being handled is the next batch (architecture, section 4).

One item when idle, so latency stays that of a single call; many under load, so throughput is that of bulk calls. There is no timer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Hands items to `handle` in batches, one batch at a time, in the order they came.

    `handle` returns one result per item; a result that is an exception is raised in the caller of that item alone. When `handle` raises,
    every caller of the batch sees that exception.
    """

    __slots__ = ("_handle", "_limit", "_running", "_waiting")

    def __init__(self, handle: Callable[[list[T]], Awaitable[Sequence[R | BaseException]]], limit: int = 500) -> None:
        self._handle = handle
        self._limit = limit
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items not yet handed over."""
        return len(self._waiting)

    async def put(self, item: T) -> R:
        """Hand over an item and wait for its result. Cancelling the caller does not take the item back once its batch has begun."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
                await self._one(batch)
        finally:
            self._running = None

    async def _one(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        try:
            results = await self._handle([item for item, _ in batch])
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
