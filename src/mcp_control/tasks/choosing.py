"""Which sessions may take tasks of a lane, and which of them do: matching, homes of sticky keys, and the strategy."""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from mcp_control.agents.balancing import Candidate, home_of, spread
from mcp_control.agents.matching import fitting, misfit
from mcp_control.agents.model import AgentSpec, Strategy
from mcp_control.agents.sessions import Session
from mcp_control.tasks.lanes import Lane
from mcp_control.tasks.speeds import Speeds

_LOOKED_AT: Final = 16


class Fleet(Protocol):
    """The agents there are, connected or not."""

    @property
    def revision(self) -> int:
        """Changes when they do."""
        ...

    def known(self, tenant: str) -> list[tuple[str, AgentSpec]]:
        """Return id and specification of each."""
        ...


class Chooser:
    """Chooses.

    Args:
        strategy: where a task does not say.
        fleet: all agents, for tasks with a key; without it they are placed as if they had none, and those that insist wait.
        speeds: what to expect of agents, for the strategy `fastest`; without it, it is `least_loaded`.
    """

    def __init__(
        self, strategy: Strategy = "least_loaded", fleet: Fleet | None = None, speeds: Speeds | None = None
    ) -> None:
        self._strategy: Strategy = strategy
        self._fleet = fleet
        self.speeds = speeds
        self._settled_at = -1

    def plain(self, lane: Lane) -> bool:
        """Say whether the least loaded agent takes the tasks of a lane, whichever that is."""
        return lane.home is None and (lane.demand.strategy or self._strategy) == "least_loaded"

    def fits(self, lane: Lane, session: Session) -> bool:
        """Say whether a session may take tasks of a lane."""
        agent = session.agent
        if lane.demand.type in session.unable or (lane.demand.waits and lane.home != agent.id):
            return False
        return agent.tenant == lane.tenant and misfit(agent.id, agent.spec, lane.demand) is None

    def home(self, lane: Lane) -> str | None:
        """Return the agent that the tasks of a lane belong to, None where they have no key or nobody can do them."""
        bucket = lane.demand.bucket
        if bucket is None or self._fleet is None:
            return None
        return home_of(bucket, fitting(self._fleet.known(lane.tenant), lane.demand))

    def moved(self, lanes: Iterable[Lane]) -> list[Lane]:
        """Find out anew where sticky lanes belong, if agents have come or gone; returns those that belong elsewhere now."""
        if self._fleet is None or self._fleet.revision == self._settled_at:
            return []
        self._settled_at = self._fleet.revision
        found: list[Lane] = []
        for lane in lanes:
            if lane.demand.bucket is not None and (home := self.home(lane)) != lane.home:
                lane.home = home
                found.append(lane)
        return found

    def pick(self, lane: Lane, free: Iterable[Session], contenders: Sequence[Lane]) -> Session | None:
        """Return the session for one task of a lane, of those that are free and that no contender could use; None where there is none."""
        best: Session | None = None
        best_load, looked, plain = 2.0, 0, self.plain(lane)
        open_to: list[Session] = []
        for session in free:
            if session not in lane.sessions or any(session in other.sessions for other in contenders):
                continue
            left = session.free
            special = lane.load is not None or session.types is not None
            if left <= 0 or (special and not lane.room(session)):
                continue
            if not plain:
                open_to.append(session)
                continue
            load = (session.slots - left) / session.slots + session.last
            if load < best_load:
                best, best_load = session, load
            looked += 1
            if looked >= _LOOKED_AT:
                break
        return open_to[self.spread(lane, open_to, 1)[0]] if open_to else best

    def spread(self, lane: Lane, sessions: Sequence[Session], count: int) -> list[int]:
        """Choose sessions that have room for up to so many tasks of a lane; returns their places."""
        strategy = lane.demand.strategy or self._strategy
        expected = [0.0] * len(sessions)
        if strategy == "fastest" and self.speeds is not None and len(sessions) > 1:
            expected = self.speeds.expected([session.agent.id for session in sessions], lane.demand.type)
        candidates = [
            Candidate(session.slots, lane.room(session), session.last, seconds, lane.home == session.agent.id)
            for session, seconds in zip(sessions, expected, strict=True)
        ]
        return spread(candidates, count, strategy)
