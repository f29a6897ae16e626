"""Users: the first administrator, logging in, changing passwords, API tokens."""

import asyncio

import pytest

from mcp_control.kernel.changes import Change, Query
from mcp_control.kernel.errors import (
    Conflict,
    Forbidden,
    Invalid,
    InvalidToken,
    NotFound,
    PasswordChangeRequired,
    Problem,
    RateLimited,
)
from mcp_control.security.model import Actor
from mcp_control.security.records import USER_KIND, to_entity, to_user
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock
from tests.security.world import GOOD, Server

HERE = "127.0.0.1"
NEW = "three quiet purple lanterns"


async def test_first_start_creates_one_administrator(server: Server) -> None:
    """The password is shown once, and never made again; starting twice at once makes one user."""
    outcomes = await asyncio.gather(*[server.accounts.ensure_administrator() for _ in range(5)])
    (once,) = [outcome for outcome in outcomes if outcome is not None]
    assert await server.accounts.ensure_administrator() is None
    users = [to_user(entity) for entity in await server.store.find(USER_KIND.name, Query())]
    assert [(user.name, user.roles, user.must_change) for user in users] == [("admin", ("administrator",), True)]
    assert once not in users[0].password_hash
    owner = await server.accounts.administrator()
    assert (owner.id, owner.kind, owner.roles) == (users[0].id, "user", ("administrator",))


async def test_one_time_password_leads_only_to_a_new_one(server: Server) -> None:
    """It gives no token; after the change it is worth nothing and the new one logs in."""
    once = await server.accounts.ensure_administrator()
    assert once is not None
    with pytest.raises(PasswordChangeRequired):
        await server.accounts.login("admin", once, HERE)
    with pytest.raises(Invalid):
        await server.accounts.change_password("admin", once, "too short", HERE)
    with pytest.raises(Invalid):
        await server.accounts.change_password("admin", once, once, HERE)
    await server.accounts.change_password("admin", once, GOOD, HERE)
    session = await server.accounts.login(" Admin ", GOOD, HERE)
    assert session.expires_in == 600
    assert session.expires_at == server.clock.now() + 600_000
    actor = await server.authenticator.authenticate(f"Bearer {session.access_token}", server.clock.now())
    assert (actor.kind, actor.display, actor.roles) == ("user", "admin", ("administrator",))
    with pytest.raises(InvalidToken):
        await server.accounts.login("admin", once, HERE)


async def test_every_failed_login_reads_the_same(server: Server) -> None:
    """Unknown user, wrong password and a disabled user cannot be told apart."""
    await server.administrator()
    (entity,) = await server.store.find(USER_KIND.name, Query())
    details = set()
    for name, password in (
        ("nobody", GOOD),
        ("admin", "wrong"),
        ("", ""),
        ("admin\x00", GOOD),
        ("a" * 5000, "\ud800" * 5000),
    ):
        with pytest.raises(InvalidToken) as caught:
            await server.accounts.login(name, password, HERE)
        details.add((caught.value.detail, caught.value.code, caught.value.retry_after, len(caught.value.data)))
    user = to_user(entity)
    disabled = to_entity(
        type(user)(
            **{
                **{name: getattr(user, name) for name in user.__struct_fields__},
                "version": user.version + 1,
                "disabled": True,
            }
        )
    )
    assert await server.store.commit([Change(writes=(disabled,))]) == [None]
    with pytest.raises(InvalidToken) as caught:
        await server.accounts.login("admin", GOOD, "127.0.0.9")
    details.add((caught.value.detail, caught.value.code, caught.value.retry_after, len(caught.value.data)))
    assert len(details) == 1


async def test_password_change_ends_tokens_given_before_on_every_server(server: Server) -> None:
    """At once on this server; within five seconds on others; tokens given afterwards work, even in the same second."""
    await server.administrator()
    other = Server(server.store, server.clock)
    old = f"Bearer {(await server.accounts.login('admin', GOOD, HERE)).access_token}"
    for each in (server, other):
        await each.authenticator.authenticate(old, server.clock.now())
    await server.accounts.change_password("admin", GOOD, NEW, HERE)
    new = f"Bearer {(await server.accounts.login('admin', NEW, HERE)).access_token}"
    with pytest.raises(InvalidToken):
        await server.authenticator.authenticate(old, server.clock.now())
    server.clock.advance(5)
    with pytest.raises(InvalidToken):
        await other.authenticator.authenticate(old, server.clock.now())
    for each in (server, other):
        await each.authenticator.authenticate(new, server.clock.now())


async def test_lost_password_is_replaced_by_an_administrator(server: Server) -> None:
    """The owner of the data folder gets in again with a one-time password; the old one and its tokens end."""
    await server.administrator()
    old = f"Bearer {(await server.accounts.login('admin', GOOD, HERE)).access_token}"
    owner = await server.accounts.administrator()
    once = await server.accounts.reset_password(owner, "admin")
    with pytest.raises(InvalidToken):
        await server.authenticator.authenticate(old, server.clock.now())
    with pytest.raises(InvalidToken):
        await server.accounts.login("admin", GOOD, HERE)
    with pytest.raises(PasswordChangeRequired):
        await server.accounts.login("admin", once, HERE)
    await server.accounts.change_password("admin", once, NEW, HERE)
    await server.accounts.login("admin", NEW, HERE)
    with pytest.raises(NotFound):
        await server.accounts.reset_password(owner, "nobody")
    with pytest.raises(Forbidden):
        await server.accounts.reset_password(Actor(id="agent_1", kind="agent", roles=("agent",)), "admin")


async def test_two_password_changes_at_once_end_in_one(server: Server) -> None:
    """Both proved the old password, so one wins and the other is told."""
    await server.administrator()
    outcomes = await asyncio.gather(
        server.accounts.change_password("admin", GOOD, NEW, HERE),
        server.accounts.change_password("admin", GOOD, NEW + " again", HERE),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) in (
        ["Conflict", "NoneType"],
        ["InvalidToken", "NoneType"],
    )
    assert all(outcome is None or isinstance(outcome, (Conflict, InvalidToken)) for outcome in outcomes)


async def test_guessing_slows_down_and_the_owner_gets_in_again(server: Server) -> None:
    """Five free failures, then doubling waits from this address; the owner elsewhere is not kept out, and waiting helps."""
    await server.administrator()
    for _ in range(5):
        with pytest.raises(InvalidToken):
            await server.accounts.login("admin", "guess", "10.0.0.1")
    waits = []
    for _ in range(10):
        with pytest.raises(RateLimited) as caught:
            await server.accounts.login("admin", GOOD, "10.0.0.1")
        assert caught.value.retry_after is not None
        waits.append(caught.value.retry_after)
        server.clock.advance(caught.value.retry_after)
        with pytest.raises(InvalidToken):
            await server.accounts.login("admin", "guess", "10.0.0.1")
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]
    await server.accounts.login("admin", GOOD, HERE)
    server.clock.advance(300)
    await server.accounts.login("admin", GOOD, "10.0.0.1")
    with pytest.raises(InvalidToken):
        await server.accounts.login("admin", "typo", "10.0.0.1")
    await server.accounts.login("admin", GOOD, "10.0.0.1")


async def test_parallel_guesses_do_not_slip_through_together(server: Server) -> None:
    """A hundred at once are counted before they are checked."""
    await server.administrator()
    outcomes = await asyncio.gather(
        *[server.accounts.login("admin", f"guess {n}", "10.0.0.1") for n in range(20)], return_exceptions=True
    )
    assert sum(isinstance(outcome, InvalidToken) for outcome in outcomes) == 5
    assert sum(isinstance(outcome, RateLimited) for outcome in outcomes) == 15


async def test_api_token_works_until_it_is_revoked(server: Server) -> None:
    """It acts for its owner, is shown once, is stored as a hash only, and ends at once here and within five seconds elsewhere."""
    await server.administrator()
    owner = await server.accounts.administrator()
    token, secret = await server.accounts.create_token(owner, "my laptop")
    assert secret.startswith("mcpt_")
    other = Server(server.store, server.clock)
    for each in (server, other):
        actor = await each.authenticator.authenticate(f"Bearer {secret}", server.clock.now())
        assert (actor.id, actor.kind, actor.roles, actor.credential) == (owner.id, "token", owner.roles, token.id)
    (listed,) = await server.accounts.list_tokens(owner)
    assert (listed.name, listed.last_used_at) == ("my laptop", server.clock.now())
    (stored,) = await server.store.get("api_token", [token.id])
    assert stored is not None
    assert secret.rpartition("_")[2].encode() not in stored.hot
    await server.accounts.revoke_token(owner, token.id)
    await server.accounts.revoke_token(owner, token.id)
    assert await server.accounts.list_tokens(owner) == []
    with pytest.raises(InvalidToken):
        await server.authenticator.authenticate(f"Bearer {secret}", server.clock.now())
    server.clock.advance(5)
    with pytest.raises(InvalidToken):
        await other.authenticator.authenticate(f"Bearer {secret}", server.clock.now())


async def test_api_token_ends_when_it_says(server: Server) -> None:
    """An expired token is refused on the millisecond, cached or not."""
    await server.administrator()
    owner = await server.accounts.administrator()
    token, secret = await server.accounts.create_token(owner, "short", 60)
    server.clock.advance(59.999)
    await server.authenticator.authenticate(f"Bearer {secret}", server.clock.now())
    assert token.expires_at == server.clock.now() + 1
    server.clock.advance(0.001)
    with pytest.raises(InvalidToken):
        await server.authenticator.authenticate(f"Bearer {secret}", server.clock.now())


@pytest.mark.parametrize(
    ("name", "life"), [("", None), ("x" * 101, None), ("a\r\nb", None), ("\x1b[31m", None), ("ok", 59), ("ok", 10**9)]
)
async def test_bad_token_wishes_are_refused(server: Server, name: str, life: int | None) -> None:
    """Names are short and printable, lives are bounded."""
    await server.administrator()
    owner = await server.accounts.administrator()
    with pytest.raises(Invalid):
        await server.accounts.create_token(owner, name, life)


async def test_tokens_belong_to_their_user(server: Server) -> None:
    """Somebody else's token does not exist; agents have none."""
    await server.administrator()
    owner = await server.accounts.administrator()
    token, _ = await server.accounts.create_token(owner, "mine")
    stranger = Actor(id="user_other", kind="user", roles=("administrator",))
    with pytest.raises(NotFound):
        await server.accounts.revoke_token(stranger, token.id)
    with pytest.raises(NotFound):
        await server.accounts.revoke_token(owner, "token_none")
    agent = Actor(id="agent_1", kind="agent", roles=("agent",))
    with pytest.raises(Forbidden):
        await server.accounts.create_token(agent, "x")


async def test_logins_and_tokens_leave_facts_without_secrets(store: SqliteStore, clock: FakeClock) -> None:
    """What happened can be read later; nobody can log in with it."""
    server = Server(store, clock)
    await server.administrator()
    session = await server.accounts.login("admin", GOOD, HERE)
    owner = await server.accounts.administrator()
    token, secret = await server.accounts.create_token(owner, "x")
    await server.accounts.revoke_token(owner, token.id)
    facts = [each.fact for each in await store.facts(0, 100)]
    assert [fact.type for fact in facts] == [
        "user.created",
        "user.password_changed",
        "user.logged_in",
        "token.created",
        "token.revoked",
    ]
    text = repr(facts)
    for hidden in (session.access_token, secret, secret.rpartition("_")[2], GOOD):
        assert hidden not in text


async def test_store_without_writes_still_lets_tokens_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noting the use of a token may fail; the request goes on."""
    await server.administrator()
    owner = await server.accounts.administrator()
    _, secret = await server.accounts.create_token(owner, "x")

    class Full:
        """A store whose disk is full."""

        get = server.store.get

        async def commit(self, changes: list[Change]) -> list[Problem | None]:
            raise Problem("full")

    monkeypatch.setattr(server.authenticator, "_store", Full())
    actor = await server.authenticator.authenticate(f"Bearer {secret}", server.clock.now())
    assert actor.id == owner.id
