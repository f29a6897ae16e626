"""Enrolment tokens serve once, credentials speak for one agent, and the authenticator tells nothing."""

import asyncio
import time

import pytest

from mcp_control.kernel.changes import Query
from mcp_control.kernel.errors import Forbidden, Invalid, InvalidToken, Unauthenticated
from mcp_control.security import opaque
from mcp_control.security.model import SYSTEM, Actor
from mcp_control.security.policy import allow
from tests.security.world import GOOD, Server

ADMIN = Actor(id="user_1", kind="user", roles=("administrator",))
AGENT = Actor(id="agent_1", kind="agent", roles=("agent",))


@pytest.mark.parametrize("uses", [1, 3])
async def test_enrolment_serves_as_often_as_it_was_made_for_even_in_a_race(server: Server, uses: int) -> None:
    """Twenty agents use it at the same moment, on two servers; exactly as many get in as were meant to."""
    _, token = await server.credentials.create_enrolment(ADMIN, uses=uses)
    other = Server(server.store, server.clock)
    outcomes = await asyncio.gather(
        *[(server, other)[n % 2].credentials.redeem(token, f"agent-{n}") for n in range(20)], return_exceptions=True
    )
    assert sum(isinstance(outcome, Actor) for outcome in outcomes) == uses
    with pytest.raises(InvalidToken):
        await server.credentials.redeem(token, "late")


async def test_refused_registration_gives_the_use_back(server: Server) -> None:
    """A name that is taken does not cost the token."""
    _, token = await server.credentials.create_enrolment(ADMIN)
    actor = await server.credentials.redeem(token, "taken")
    await server.credentials.give_back(actor)
    again = await server.credentials.redeem(token, "free")
    assert (again.roles, again.on_behalf_of) == (("enrolment",), "user_1")
    with pytest.raises(InvalidToken):
        await server.credentials.redeem(token, "more")


async def test_enrolment_ends_after_its_time_and_serves_its_name_only(server: Server) -> None:
    """Ten minutes at most; bound to a name if it was made so; garbage and other kinds of token are refused alike."""
    _, named = await server.credentials.create_enrolment(ADMIN, name="worker-1", uses=2)
    with pytest.raises(InvalidToken):
        await server.credentials.redeem(named, "worker-2")
    await server.credentials.redeem(named, "worker-1")
    wrong = named[:-1] + ("0" if named[-1] != "0" else "1")
    credential = await server.credentials.issue(ADMIN, "agent_1", "worker-1")
    for token in (wrong, "mcpe_x_y", "", credential):
        with pytest.raises(InvalidToken):
            await server.credentials.redeem(token, "worker-1")
    server.clock.advance(600)
    with pytest.raises(InvalidToken):
        await server.credentials.redeem(named, "worker-1")
    assert await server.credentials.once(server.clock.now()) == 0
    server.clock.advance(1)
    assert await server.credentials.once(server.clock.now()) == 1
    assert await server.store.find("enrolment", Query()) == []


@pytest.mark.parametrize(("ttl", "uses"), [(0, 1), (601, 1), (-5, 1), (600, 0), (600, 1001)])
async def test_enrolments_are_short_and_few(server: Server, ttl: int, uses: int) -> None:
    """Life and uses are bounded."""
    with pytest.raises(Invalid):
        await server.credentials.create_enrolment(ADMIN, ttl_seconds=ttl, uses=uses)


async def test_agent_cannot_enrol_agents(server: Server) -> None:
    """A stolen agent credential does not multiply."""
    with pytest.raises(Forbidden):
        await server.credentials.create_enrolment(AGENT)


async def test_credential_speaks_for_its_agent_until_it_retires(server: Server) -> None:
    """All credentials of a retired agent end, those of others do not."""
    first = await server.credentials.issue(ADMIN, "agent_1", "one")
    second = await server.credentials.issue(ADMIN, "agent_1", "one")
    other = await server.credentials.issue(ADMIN, "agent_2", "two")
    for token in (first, second):
        actor = await server.authenticator.authenticate(f"Bearer {token}", server.clock.now())
        assert (actor.id, actor.kind, actor.display, actor.roles) == ("agent_1", "agent", "one", ("agent",))
    assert await server.credentials.revoke_agent(ADMIN, "agent_1") == 2
    assert await server.credentials.revoke_agent(ADMIN, "agent_1") == 0
    for token in (first, second):
        with pytest.raises(InvalidToken):
            await server.authenticator.authenticate(f"Bearer {token}", server.clock.now())
    assert (await server.authenticator.authenticate(f"Bearer {other}", server.clock.now())).id == "agent_2"
    with pytest.raises(Forbidden):
        await server.credentials.revoke_agent(Actor(id="agent_2", kind="agent", roles=("agent",)), "agent_1")


@pytest.mark.parametrize("header", [None, "", " ", "\t"])
async def test_nothing_presented_is_told_apart_from_something_bad(server: Server, header: str | None) -> None:
    """Only here a program learns that it has to authenticate at all."""
    with pytest.raises(Unauthenticated):
        await server.authenticator.authenticate(header, server.clock.now())


async def test_everything_bad_reads_the_same(server: Server) -> None:
    """Wrong scheme, unknown id, wrong secret, wrong kind, over-long, not ASCII: one answer."""
    await server.administrator()
    owner = await server.accounts.administrator()
    _, good = await server.accounts.create_token(owner, "x")
    _, enrolment = await server.credentials.create_enrolment(owner)
    session = await server.accounts.login("admin", GOOD, "127.0.0.1")
    headers = [
        "Basic YWRtaW46YWRtaW4=",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Bearer " + "x" * 9000,
        "Bearer mcpt_",
        "Bearer é",
        good,
        f"Token {good}",
        f"Bearer {good}x",
        f"Bearer {good[:-1]}",
        f"Bearer {good[:-1]}{'1' if good[-1] == '0' else '0'}",
        f"Bearer {good.replace('mcpt', 'mcpa')}",
        f"Bearer {good.replace('mcpt', 'mcpe')}",
        f"Bearer {enrolment}",
        f"Bearer {opaque.write('mcpt', 'token_' + '0' * 36, '0' * 52)}",
        f"Bearer {opaque.write('mcpa', 'cred_' + '0' * 36, '0' * 52)}",
        f"Bearer {good} {good}",
        f"Bearer {session.access_token}x",
        f"Bearer {Server(server.store, server.clock).tokens.issue('user_none', 1, 's', server.clock.now())}",
    ]
    answers = set()
    for header in headers:
        with pytest.raises(InvalidToken) as caught:
            await server.authenticator.authenticate(header, server.clock.now())
        answers.add((caught.value.detail, caught.value.retry_after, caught.value.errors, len(caught.value.data)))
    assert len(answers) == 1
    for scheme in ("Bearer ", "bearer ", "BEARER   "):
        assert (await server.authenticator.authenticate(scheme + good, server.clock.now())).id == owner.id


async def test_verified_credential_costs_next_to_nothing(server: Server) -> None:
    """A request with a credential seen a moment ago pays no signature, no read; and the cache holds no secret and stays small."""
    header = f"Bearer {await server.credentials.issue(ADMIN, 'agent_1', 'one')}"
    now = server.clock.now()
    await server.authenticator.authenticate(header, now)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            await server.authenticator.authenticate(header, now)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 10e-6
    assert header.rpartition("_")[2] not in repr(server.verified._entries)
    for n in range(10_500):
        server.verified.put(f"Bearer {n}", ADMIN, now)
    assert len(server.verified._entries) == 10_000
    assert server.verified.get(header, now) is None
    assert server.verified.get("Bearer 10499", now) is ADMIN
    assert server.verified.get("Bearer 10499", now + 5000) is None
    assert server.verified.get("Bearer 10499", now - 1) is None


@pytest.mark.parametrize(
    ("actor", "action", "resource", "allowed"),
    [
        (SYSTEM, "anything.at_all", None, True),
        (ADMIN, "agents.retire", "agent_1", True),
        (AGENT, "tasks.claim", "agent_1", True),
        (AGENT, "tasks.claim", "agent_2", False),
        (AGENT, "tasks.claim", None, False),
        (AGENT, "tasks.submit", None, False),
        (AGENT, "agents.retire", "agent_1", False),
        (AGENT, "artifacts.create", None, True),
        (AGENT, "artifacts.read", "art_1", True),
        (AGENT, "artifacts.delete", "art_1", False),
        (AGENT, "tokens.create", None, False),
        (Actor(id="enrol_1", kind="agent", roles=("enrolment",)), "agents.register", None, True),
        (Actor(id="enrol_1", kind="agent", roles=("enrolment",)), "agents.register", "agent_1", False),
        (Actor(id="enrol_1", kind="agent", roles=("enrolment",)), "artifacts.read", "art_1", False),
        (Actor(id="user_2", kind="user"), "tasks.list", None, False),
        (Actor(id="user_2", kind="user", roles=("agent",)), "artifacts.create", None, False),
        (Actor(id="user_2", kind="user", roles=("Administrator",)), "tasks.list", None, False),
    ],
)
def test_policy_denies_what_it_does_not_name(actor: Actor, action: str, resource: str | None, allowed: bool) -> None:
    """An administrator may everything, an agent its own work, anybody else nothing."""
    if allowed:
        allow(actor, action, resource)
    else:
        with pytest.raises(Forbidden):
            allow(actor, action, resource)
