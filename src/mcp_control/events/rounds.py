"""Events to a crowd: those who keep up are served together, in one pass over all of them.

Followers with the same filter form a group. What the group is told gathers once for all of it, and a round passes the same batch to each
member, so that a batch is encoded once and a member costs little more than the write. A member whose way is not free when its turn comes
leaves the rounds with what it has not got: from there it iterates over its own subscription, under the rules for those who are slow, and
joins again when it has caught up. So nobody waits for the slowest.

The first fact after a pause goes out at once. After a round the server rests three times as long as the round took, so that rounds take
at most a quarter of its time, but never longer than 20 ms; what happens meanwhile goes out together.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import structlog

from mcp_control.events.backlog import Backlog, Batch
from mcp_control.events.broadcaster import Broadcaster, Subscription
from mcp_control.events.filters import Filter
from mcp_control.kernel.changes import StoredFact

_log = structlog.get_logger(__name__)
_REST: Final = 3
_REST_MOST: Final = 0.02
_TICK: Final = 0.001  # what timers of the loop can tell apart
# Members between two looks at what else the loop has to do: about half a millisecond.
_STRIDE: Final = 64


class Member(Protocol):
    """A follower whose batches the rounds bring."""

    def take(self, batch: Batch) -> bool:
        """Pass a batch on at once, or return False without having passed on any of it. Members of a group get the same object."""

    def behind(self) -> None:
        """Iterate over the subscription again: it has the batch that could not be passed on, and what follows."""


class Rounds:
    """Serves the followers of a server that keep up. `clock` returns seconds."""

    def __init__(self, broadcaster: Broadcaster, clock: Callable[[], float] = time.perf_counter) -> None:
        self._broadcaster = broadcaster
        self._clock = clock
        self._groups: dict[Filter, _Group] = {}
        self._due: dict[_Group, None] = {}
        self._planned: asyncio.Handle | None = None
        self._resting = False
        self._round: Iterator[None] | None = None
        self._began = 0.0
        self._rested = 0.0

    def join(self, subscription: Subscription, member: Member) -> bool:
        """Serve a subscription until it is closed or falls behind; False while it still has something to pass on itself."""
        if not subscription.hand_over(self._leave):
            return False
        group = self._groups.get(subscription.filter)
        if group is None:
            newest = self._broadcaster.newest
            group = self._groups[subscription.filter] = _Group(
                self, subscription.filter, newest, self._broadcaster.backlog
            )
            self._broadcaster.attach(group)
        group.arriving[subscription] = (member, self._broadcaster.newest)
        return True

    def due(self, group: "_Group") -> None:
        """Hear from a group that it was told something."""
        self._due[group] = None
        if self._round is not None:
            return
        if self._planned is None:
            self._plan()
        elif self._resting and group.backlog.half_full:
            self._planned.cancel()
            self._resting = False
            self._planned = asyncio.get_running_loop().call_soon(self._begin)

    def _leave(self, subscription: Subscription) -> None:
        group = self._groups[subscription.filter]
        if group.arriving.pop(subscription, None) is None:
            del group.members[subscription]
        self._forget_empty(group)

    def _forget_empty(self, group: "_Group") -> None:
        if not group.members and not group.arriving:
            del self._groups[group.filter]
            self._due.pop(group, None)
            self._broadcaster.detach(group)

    def _plan(self) -> None:
        wait = self._rested - self._clock()
        loop = asyncio.get_running_loop()
        self._resting = wait >= _TICK
        self._planned = loop.call_later(wait, self._begin) if self._resting else loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._planned = None
        self._began = self._clock()
        due, self._due = self._due, {}
        self._round = self._steps([*due])
        self._step()

    def _step(self) -> None:
        assert self._round is not None
        for _ in self._round:
            asyncio.get_running_loop().call_soon(self._step)
            return
        self._round = None
        now = self._clock()
        self._rested = now + min(_REST * (now - self._began), _REST_MOST)
        if self._due:
            self._plan()

    def _steps(self, groups: list["_Group"]) -> Iterator[None]:
        served = 0
        for group in groups:
            batch = group.backlog.take(self._broadcaster.newest)
            if batch is None:
                continue  # all its members left
            for subscription, member, part in group.turns(batch):
                self._serve(group, subscription, member, part)
                served += 1
                if served % _STRIDE == 0:
                    yield
        # The loop hands what was written to the network after this step, which is the dearer part of a round.
        yield

    def _serve(self, group: "_Group", subscription: Subscription, member: Member, batch: Batch) -> None:
        try:
            if member.take(batch):
                return
        except Exception:
            _log.exception("a follower failed in a round")
        if group.members.pop(subscription, None) is None:
            return  # it ended in its turn
        subscription.take_back(batch, group.backlog.look(self._broadcaster.newest))
        self._forget_empty(group)
        member.behind()


class _Group:
    """Those who follow the same.

    Attributes:
        members: who gets the next batch.
        arriving: who joined since the last one, and the fact up to which they have everything.
    """

    __slots__ = ("_rounds", "arriving", "backlog", "filter", "members")

    def __init__(self, rounds: Rounds, filter: Filter, newest: int, backlog: int) -> None:
        self._rounds = rounds
        self.filter = filter
        self.backlog = Backlog(newest, backlog)
        self.members: dict[Subscription, Member] = {}
        self.arriving: dict[Subscription, tuple[Member, int]] = {}

    def offer(self, stored: StoredFact) -> None:
        if self.backlog.offer(stored):
            self._rounds.due(self)

    def turns(self, batch: Batch) -> Iterator[tuple[Subscription, Member, Batch]]:
        """Yield the members and what each gets; who leaves before its turn has none, who comes meanwhile waits for the next round."""
        settled = [*self.members.items()]
        arrived, self.arriving = self.arriving, {}
        for subscription, (member, _) in arrived.items():
            self.members[subscription] = member
        for subscription, member in settled:
            if subscription in self.members:
                yield subscription, member, batch
        for subscription, (member, after) in arrived.items():
            later = [stored for stored in batch.facts if stored.seq > after]
            if subscription in self.members and (later or batch.reread):
                yield (
                    subscription,
                    member,
                    batch if len(later) == len(batch.facts) else Batch(later, batch.reread, batch.after),
                )
