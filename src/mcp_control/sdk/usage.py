"""What an attempt uses, told to the server as totals, and what it holds of its budget before it spends it."""

import threading
import time
from collections.abc import Callable
from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Final, Literal, TypedDict

from mcp_control.sdk import calls
from mcp_control.sdk.errors import Cancelled, Conflicting
from mcp_control.tasks.budget_model import MICROS, SpendAnswer, Spent
from mcp_control.tasks.wire import Assignment

if TYPE_CHECKING:
    from mcp_control.sdk.client import AsyncClient, Client

Money = Decimal | int | str | float
Measure = Literal["calls", "tokens", "money_micros"]
_OVER: Final = frozenset({"budget-exhausted", "lease-superseded", "not-found"})


class Added(TypedDict, total=False):
    """What is added to the limits of a budget; what has no limit stays without one."""

    wall_seconds: float
    attempts: int
    calls: int
    tokens: int
    money_micros: int


def micros(money: Money) -> int:
    """Return an amount of money in millionths, rounded up. Raises ValueError for one below zero."""
    found = int((Decimal(str(money)) * MICROS).to_integral_value(ROUND_CEILING))
    if found < 0:
        raise ValueError("money is not given back")
    return found


class Meter:
    """Counts what one attempt uses and holds; from any thread.

    Args:
        tell: puts what was used in the next report to the server.
    """

    def __init__(self, assignment: Assignment, tell: Callable[[Spent], None]) -> None:
        self._task_id = assignment.task_id
        self._lease_token = assignment.lease_token
        self._tell = tell
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._began = time.monotonic()
        self._left = assignment.budget
        self._since: dict[Measure, int] = {}
        self._number = 0
        self._used: dict[Measure, int] = {"calls": 0, "tokens": 0, "money_micros": 0}
        self._held: dict[Measure, int] = {}
        self._pending = False
        self._untold = False

    @property
    def left(self) -> dict[str, float] | None:
        """What is left of what is limited: what the server said last, less what this attempt has used and holds since."""
        with self._lock:
            if self._left is None:
                return None
            found = dict(self._left)
            for name, used in self._used.items():
                if name in found:
                    found[name] = max(0, found[name] - (used - self._since.get(name, 0)))
            if "wall_seconds" in found:
                found["wall_seconds"] = max(0.0, found["wall_seconds"] - (time.monotonic() - self._began))
            return found

    def use(self, amounts: dict[Measure, int], release: dict[Measure, int] | None = None) -> None:
        """Count what was used, and give back what was held for it."""
        with self._lock:
            for name, more in amounts.items():
                self._used[name] += more
            for name, less in (release or {}).items():
                self._held[name] = self._held.get(name, 0) - less
            if self._pending:
                self._untold = True  # the server takes the newest number for the truth, and one is on its way
                return
            told = self._spent()
        self._tell(told)

    def _spent(self, ask: dict[Measure, int] | None = None) -> Spent:
        self._number += 1
        held: dict[Measure, int] = {name: total for name, total in self._held.items() if total > 0}
        return Spent(
            number=self._number,
            calls=self._used["calls"],
            tokens=self._used["tokens"],
            money_micros=self._used["money_micros"],
            held=held,
            ask=ask or {},
        )

    def ask(self, amounts: dict[Measure, int]) -> "calls.Request[SpendAnswer]":
        """Return the request that asks to hold so much more; `answered` must follow."""
        with self._lock:
            self._pending = True
            return calls.report_usage(self._task_id, self._lease_token, self._spent(amounts))

    def answered(self, amounts: dict[Measure, int], answer: SpendAnswer | None) -> bool:
        """Hear the answer, None where there was none; say whether it is held."""
        granted = answer is not None and answer.granted
        with self._lock:
            self._pending = False
            if answer is not None and self._left is not None:
                self._left, self._since, self._began = answer.left, dict(self._used), time.monotonic()
            if granted:
                for name, more in amounts.items():
                    self._held[name] = self._held.get(name, 0) + more
            untold, self._untold = self._untold or answer is None, False
            told = self._spent() if untold else None
        if told is not None:
            self._tell(told)
        return granted

    def reserve(self, client: "Client", amounts: dict[Measure, int]) -> bool:
        """Ask and wait for the answer. Raises Cancelled when nothing may be used any more."""
        with self._asking:
            answer: SpendAnswer | None = None
            granted = False
            try:
                answer = client.do(self.ask(amounts))
            except Conflicting as problem:
                raise _stopped(problem) from problem
            finally:
                granted = self.answered(amounts, answer)
            return granted

    async def reserve_async(self, client: "AsyncClient", amounts: dict[Measure, int]) -> bool:
        """The same for coroutines; one question at a time is the caller's business."""
        answer: SpendAnswer | None = None
        granted = False
        try:
            answer = await client.do(self.ask(amounts))
        except Conflicting as problem:
            raise _stopped(problem) from problem
        finally:
            granted = self.answered(amounts, answer)
        return granted


def _stopped(problem: Conflicting) -> Exception:
    return Cancelled(problem.detail, code=problem.code) if problem.code in _OVER else problem


class Reservation:
    """Something held of a budget; true if it was granted.

    `use` counts what was really used and gives back the rest; `release` gives all of it back. What is still held when the attempt ends
    is given back then.
    """

    def __init__(self, meter: Meter, amounts: dict[Measure, int], granted: bool) -> None:
        self._meter = meter
        self._amounts = amounts
        self._granted = granted
        self._open = granted

    def __bool__(self) -> bool:
        return self._granted

    def use(self, *, calls: int = 0, tokens: int = 0, money: Money = 0) -> None:
        """Count what was used, and give back what was held."""
        self._meter.use(counted(calls, tokens, money), self._amounts if self._open else None)
        self._open = False

    def release(self) -> None:
        """Give back what was held; nothing was used."""
        if self._open:
            self._open = False
            self._meter.use({}, self._amounts)


def counted(calls: int, tokens: int, money: Money) -> dict[Measure, int]:
    """Return amounts by measure. Raises ValueError for one below zero."""
    if calls < 0 or tokens < 0:
        raise ValueError("what was used is not given back")
    found: dict[Measure, int] = {"calls": calls, "tokens": tokens, "money_micros": micros(money)}
    return {name: value for name, value in found.items() if value}
