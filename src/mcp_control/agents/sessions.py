"""Live sessions of agent instances on this server: who is connected, what each holds, and how to reach it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from mcp_control.agents.model import Agent, Instance
from mcp_control.agents.reserving import Account, Load, Types, capacity, fits, limits_of

Frame = object


class Watcher(Protocol):
    """Wants to know of sessions that come, go or change what they accept."""

    def opened(self, session: "Session") -> None:
        """A session is there and may take work."""
        ...

    def closed(self, session: "Session") -> None:
        """A session is gone."""
        ...


class Session:
    """One connected instance. `send` puts a frame on its way without waiting; it never fails.

    Attributes:
        held: ids of the tasks whose lease this instance has; changed by `hold` and `let_go`.
        account: what those take that take more than a slot; None as long as none has.
        types: how many it holds of each type; None for an agent that limits none.
        allowance: how many further tasks it takes right now beside its free slots; None for a socket, which takes as many as it has slots.
            A long poll sets it while it waits.
        accepting: whether it may be given work at all.
        asked: how often it has asked for work, for one that polls.
        probing: it gets one task, to show that its agent is well; and the next when that says nothing (`try_again`).
        last: it is chosen when nobody else can, as its agent is slow.
        unable: types of tasks that it has said it has no handler for, though its agent has them: an older process of that name.
        parted: called when the session is dropped; a long poll sets it while it waits.
    """

    __slots__ = (
        "_tried",
        "accepting",
        "account",
        "agent",
        "allowance",
        "asked",
        "held",
        "instance",
        "last",
        "leaving",
        "parted",
        "probing",
        "send",
        "slots",
        "stalled",
        "types",
        "unable",
    )

    def __init__(
        self,
        agent: Agent,
        instance: Instance,
        slots: int,
        send: Callable[[Sequence[Frame]], None],
        allowance: int | None,
    ) -> None:
        self.agent = agent
        self.instance = instance
        self.slots = slots
        self.send = send
        self.allowance = allowance
        self.held: set[str] = set()
        self.account: Account | None = None
        self.types: Types | None = None
        self.parted: Callable[[], None] | None = None
        self.leaving = False
        self.stalled = False
        self.accepting = True
        self.asked = 0
        self.probing = False
        self._tried = False
        self.last = False
        self.unable: set[str] = set()
        self.refresh(agent)

    @property
    def free(self) -> int:
        """Tasks it can take now."""
        if not self.accepting:
            return 0
        free = self.slots - len(self.held)
        if self.account is not None:
            free -= self.account.extra
        if self.allowance is not None and self.allowance < free:
            free = self.allowance
        if self.probing:
            free = min(free, 0 if self._tried else 1 - len(self.held))
        return max(0, free)

    @property
    def taken(self) -> int:
        """Slots that its tasks take."""
        return len(self.held) if self.account is None else len(self.held) + self.account.extra

    def room(self, load: Load | None, task_type: str) -> int:
        """Return how many tasks of this type that take this much it can take now."""
        free = self.free
        if self.types is not None and (more := self.types.left(task_type, len(self.held))) is not None:
            free = min(free, more)
        if load is None or free <= 0:
            return free
        # The free slots of a poller are bounded by tasks, too: what it still takes is a number of tasks.
        return min(fits(load, self.left()), free)

    def left(self) -> Load:
        """Return what its tasks leave of it."""
        left = capacity(self.slots, self.agent.spec.resources)
        if self.account is not None:
            left = self.account.left(left)
        return Load(self.slots - self.taken, left.cpu, left.memory_mb, left.gpu)

    def hold(self, task_id: str, load: Load | None, task_type: str | None = None) -> None:
        """Count a task as held, with what it takes; one whose type is not known here counts for all that are limited."""
        self.held.add(task_id)
        if self.types is not None and task_type is not None:
            self.types.take(task_id, task_type)
        self._tried = self.probing
        if load is not None:
            if self.account is None:
                self.account = Account()
            self.account.take(task_id, load)

    def let_go(self, task_id: str) -> Load | None:
        """Count a task as held no more; returns what it took."""
        self.held.discard(task_id)
        if self.types is not None:
            self.types.give(task_id)
        return None if self.account is None else self.account.give(task_id)

    def try_again(self) -> bool:
        """Let an instance on trial that has nothing any more get another task; says whether that changes anything."""
        tried, self._tried = self._tried, self._tried and bool(self.held)
        return tried and not self._tried

    def counted(self) -> set[str]:
        """Return the tasks for which something is taken."""
        return set(self.held) if self.account is None else self.held | self.account.loads().keys()

    def take_over(self, before: "Session") -> None:
        """Hold what an earlier session of the same instance held."""
        self.held |= before.held
        if self.types is not None and before.types is not None:
            self.types.take_over(before.types)
        if before.account is not None:
            if self.account is None:
                self.account = Account()
            self.account.take_over(before.account)

    def refresh(self, agent: Agent) -> None:
        """Take over a newer value of the agent and what follows for accepting work."""
        self.agent = agent
        limits = limits_of(agent.spec)
        if not limits:
            self.types = None
        elif self.types is None:
            self.types = Types(limits)
        else:
            self.types.limits = limits
        ordered_off = agent.drain is not None or agent.quarantine is not None or agent.retired_at is not None
        self.accepting = not (ordered_off or self.leaving or self.stalled)
        self._tried = self._tried and self.probing
        self.probing = agent.health.probing
        self.last = agent.health.verdict == "slow"


class Sessions:
    """All live sessions of this server, by instance and by agent.

    Attributes:
        greeting: called with every session that is added.
    """

    def __init__(self) -> None:
        self._by_instance: dict[str, Session] = {}
        self._by_agent: dict[str, dict[str, Session]] = {}
        self._watchers: list[Watcher] = []
        self.greeting: list[Callable[[Session], None]] = []

    def __len__(self) -> int:
        return len(self._by_instance)

    def watch(self, watcher: Watcher) -> None:
        """Tell a watcher of every session from now on."""
        self._watchers.append(watcher)

    def get(self, instance_id: str) -> Session | None:
        """Return the session of an instance, None when it has none here."""
        return self._by_instance.get(instance_id)

    def of_agent(self, agent_id: str) -> list[Session]:
        """Return the sessions of an agent."""
        return list(self._by_agent.get(agent_id, {}).values())

    def all(self) -> Iterable[Session]:
        """Return every session."""
        return list(self._by_instance.values())

    def add(self, session: Session) -> Session | None:
        """Add a session; returns the one of the same instance that it replaces, whose held tasks it takes over."""
        instance_id = session.instance.id
        before = self.drop(instance_id)
        if before is not None:
            session.take_over(before)
        self._by_instance[instance_id] = session
        self._by_agent.setdefault(session.agent.id, {})[instance_id] = session
        for watcher in self._watchers:
            watcher.opened(session)
        for greet in self.greeting:
            greet(session)
        return before

    def drop(self, instance_id: str) -> Session | None:
        """Forget a session; its leases live on until they end in the store."""
        session = self._by_instance.pop(instance_id, None)
        if session is None:
            return None
        session.accepting = False
        if session.parted is not None:
            session.parted()
        siblings = self._by_agent[session.agent.id]
        del siblings[instance_id]
        if not siblings:
            del self._by_agent[session.agent.id]
        for watcher in self._watchers:
            watcher.closed(session)
        return session

    def refresh(self, agent: Agent) -> None:
        """Take over a newer value of an agent in all its sessions, which may change what they match."""
        for session in self.of_agent(agent.id):
            unchanged = session.agent.spec == agent.spec
            accepted = session.accepting, session.probing
            session.refresh(agent)
            if unchanged and accepted == (session.accepting, session.probing):
                continue
            session.slots = agent.spec.slots
            session.unable.clear()
            self._match(session)

    def turned_down(self, session: Session, task_type: str) -> None:
        """Hear that an instance has no handler for a type: it gets no more of it until its agent is changed or it comes anew."""
        session.unable.add(task_type)
        self._match(session)

    def _match(self, session: Session) -> None:
        for watcher in self._watchers:
            watcher.closed(session)
            watcher.opened(session)
