"""What agents hold: never more than they declared, whatever is reserved, released and reconnected."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from mcp_control.agents.model import Agent, AgentSpec, Capability, Instance, Resources
from mcp_control.agents.reserving import Account, Load, Types, fits, limits_of, load_of, short_of
from mcp_control.agents.sessions import Session, Sessions

LOADS = st.builds(
    load_of,
    st.integers(1, 4),
    st.builds(
        Resources,
        cpu=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
        memory_mb=st.sampled_from([0, 100, 700]),
        gpu=st.integers(0, 1),
    ),
)
THERE = Resources(cpu=2.0, memory_mb=1500, gpu=2)


class Reserving(RuleBasedStateMachine):
    """An instance with 6 slots that is given tasks, ends them, loses its connection and comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions()
        self.agent = Agent(id="agent_1", version=1, spec=AgentSpec(name="w", slots=6, resources=THERE), created_at=0)
        self.instance = Instance(
            id="inst_1", version=1, agent_id="agent_1", started_at=0, lease_ms=1000, lease_until=1000
        )
        self.truth: dict[str, Load | None] = {}
        self.types: dict[str, str] = {}
        self.number = 0
        self.connect()

    def connect(self) -> None:
        """Open a session, as after a reconnect or on another server: leases come from the store, the rest from before."""
        session = Session(self.agent, self.instance, 6, lambda _: None, None)
        for task_id, load in list(self.truth.items())[::2]:
            session.hold(task_id, load, self.types[task_id])
        self.sessions.add(session)
        self.session = session

    @rule(load=LOADS, task_type=st.sampled_from(["a", "b"]))
    def reserve(self, load: Load | None, task_type: str) -> None:
        """Give the instance a task where it has room for it: never more of a type than the agent says."""
        room = self.session.room(load, task_type)
        limit = limits_of(self.agent.spec).get(task_type, 6)
        held = sum(self.types[task_id] == task_type for task_id in self.truth)
        assert room <= max(0, limit - held)
        if room > 0:
            self.number += 1
            self.session.hold(f"task_{self.number}", load, task_type)
            self.truth[f"task_{self.number}"] = load
            self.types[f"task_{self.number}"] = task_type

    @rule(limits=st.sampled_from([{}, {"a": 1}, {"a": 3}, {"a": 2, "b": 1}]))
    def limit(self, limits: dict[str, int]) -> None:
        """The agent limits other types than before, or none."""
        offered = [Capability(name=name, limit=limit) for name, limit in limits.items()]
        self.agent = replace(self.agent, spec=replace(self.agent.spec, capabilities=offered))
        self.sessions.refresh(self.agent)

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """End a task, and say so twice."""
        task_id = data.draw(st.sampled_from(sorted(self.truth)))
        load = self.truth.pop(task_id)
        del self.types[task_id]
        assert self.session.let_go(task_id) == load
        assert self.session.let_go(task_id) is None

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def hold_again(self, data: st.DataObject) -> None:
        """Hear a second time that a task is held."""
        task_id = data.draw(st.sampled_from(sorted(self.truth)))
        self.session.hold(task_id, self.truth[task_id], self.types[task_id])

    @rule()
    def reconnect(self) -> None:
        """Come back on a new connection."""
        self.connect()

    @invariant()
    def never_more_than_declared(self) -> None:
        """The sums over what is held are what is counted, and within what the agent declared."""
        loads = [load or Load() for load in self.truth.values()]
        assert self.session.held == set(self.truth) == self.session.counted()
        assert self.session.taken == sum(load.slots for load in loads) <= 6
        assert sum(load.cpu for load in loads) <= 2000
        assert sum(load.memory_mb for load in loads) <= 1500
        assert sum(load.gpu for load in loads) <= 2
        assert self.session.free == 6 - self.session.taken


TestReserving = Reserving.TestCase
TestReserving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(
    load=LOADS, left=st.builds(Load, st.integers(0, 8), st.integers(0, 3000), st.integers(0, 2000), st.integers(0, 3))
)
def test_what_is_short_is_what_keeps_a_task_out(load: Load | None, left: Load) -> None:
    """Something is short exactly where no further task fits, and as many as are said to fit do."""
    load = load or Load()
    count = fits(load, left)
    assert (short_of(load, left) is None) == (count > 0)
    assert count * load.slots <= left.slots
    assert count * load.cpu <= left.cpu or not load.cpu
    more = count + 1
    assert more * load.slots > left.slots or any(
        getattr(load, name) and more * getattr(load, name) > getattr(left, name) for name in ("cpu", "memory_mb", "gpu")
    )


def test_what_was_held_before_there_were_limits_counts_for_every_type() -> None:
    """A limit holds from the moment it is there: tasks of unknown type may be of the limited one, and stop counting when they end."""
    types = Types({"a": 2})
    assert types.left("a", held=1) == 1
    types.take("task_2", "a")
    types.take("task_2", "a")
    assert (types.left("a", held=2), types.left("b", held=2)) == (0, None)
    types.give("task_2")
    assert types.left("a", held=0) == 2


def test_an_ordinary_task_has_no_load() -> None:
    """One slot and no resources are counted without an account."""
    assert load_of(1, Resources()) is None
    account = Account()
    assert account.give("task_1") is None
