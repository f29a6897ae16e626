"""Users: the first administrator, login, passwords and API tokens."""

import contextlib
import unicodedata
from typing import Final

import msgspec

from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Fact, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, InvalidToken, NotFound, PasswordChangeRequired, field_error
from mcp_control.kernel.ids import IdSource
from mcp_control.security import opaque
from mcp_control.security.model import DEFAULT_TENANT, Actor
from mcp_control.security.passwords import Passwords, check_strength, normalise, one_time_password
from mcp_control.security.policy import ADMINISTRATOR, allow
from mcp_control.security.records import (
    API_TOKEN_KIND,
    USER_KIND,
    ApiToken,
    Record,
    User,
    to_api_token,
    to_entity,
    to_user,
)
from mcp_control.security.throttle import LoginThrottle
from mcp_control.security.tokens import AccessTokens
from mcp_control.security.verified import VerifiedCache
from mcp_control.storage.ports import Store

FIRST_NAME: Final = "admin"
MAX_TOKENS: Final = 100
MAX_TOKEN_SECONDS: Final = 366 * 86_400
_TRIES: Final = 10


class Session(msgspec.Struct, frozen=True):
    """What a login gives: an access token and when it ends (wall milliseconds)."""

    access_token: str
    expires_in: int
    expires_at: int


class Accounts:
    """Users of one server.

    Args:
        verified: shared with the `Authenticator`, so that what ends here ends there at once.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        passwords: Passwords,
        tokens: AccessTokens,
        throttle: LoginThrottle,
        verified: VerifiedCache,
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._passwords = passwords
        self._tokens = tokens
        self._throttle = throttle
        self._verified = verified

    async def ensure_administrator(self) -> str | None:
        """Create the first administrator where there is no user yet.

        Returns the one-time password, to be shown once and never stored; None when there is a user already.
        """
        if await self._store.find(USER_KIND.name, Query(limit=1)):
            return None
        now = self._clock.now()
        password = one_time_password()
        user = User(
            id=self._ids.new("user"),
            version=1,
            name=FIRST_NAME,
            roles=(ADMINISTRATOR,),
            password_hash=await self._passwords.hash(password),
            must_change=True,
            created_at=now,
            changed_at=now,
        )
        try:
            await self._commit(user, fact("user.created", user.id, "system", now, {"name": user.name}))
        except Conflict:  # another start was faster; the password it shows is the one that holds
            return None
        return password

    async def administrator(self) -> Actor:
        """Return an administrator as an actor, for the owner of the data folder (who could write the files anyway).

        Raises:
            NotFound: there is no administrator yet.
        """
        position: list[str] | None = None
        while page := await self._store.find(USER_KIND.name, Query(limit=100, after=position)):
            for user in map(to_user, page):
                if ADMINISTRATOR in user.roles and not user.disabled:
                    return Actor(id=user.id, kind="user", tenant=user.tenant, display=user.name, roles=user.roles)
            position = [page[-1].id]
        raise NotFound("there is no administrator")

    # --- passwords ------------------------------------------------------------------------------------------------

    async def login(self, username: str, password: str, address: str) -> Session:
        """Give an access token for a name and a password; `address` is where the attempt comes from, for the backoff.

        Raises:
            InvalidToken: unknown user, disabled user or wrong password; the answer and its time are the same.
            PasswordChangeRequired: the password is right and meant for one use: set another (`change_password`).
            RateLimited: too many failures; Overloaded: too many logins at once.
            StoreUnavailable, OutcomeUnknown, StorageFull: failures cannot be counted, so nobody logs in.
        """
        user = await self._check(username, password, address)
        if user.must_change:
            raise PasswordChangeRequired("this password is for one use: set a new one")
        now = self._clock.now()
        token_id = self._ids.new("session")
        token = self._tokens.issue(user.id, user.epoch, token_id, now)
        entry = fact("user.logged_in", user.id, user.id, now, {"session": token_id}, tenant=user.tenant)
        await self._apply(Change(facts=(entry,)))
        life = self._tokens.life_seconds
        return Session(token, life, now + life * 1000)

    async def change_password(self, username: str, current: str, new: str, address: str) -> None:
        """Set a new password. It is authenticated by the current one; all access tokens given before end.

        Raises:
            Invalid: `weak-password`, or `same-password` where nothing would change.
            InvalidToken, RateLimited, Overloaded: as in `login`.
        """
        user = await self._check(username, current, address)
        check_strength(new, user.name)
        if normalise(new) == normalise(current):
            raise field_error("#/new_password", "same-password", "the new password is the current one")
        digest = await self._passwords.hash(new)
        now = self._clock.now()
        # No second try on a conflict: the current password may not be the one that was checked any more.
        changed = msgspec.structs.replace(
            user,
            version=user.version + 1,
            password_hash=digest,
            must_change=False,
            epoch=user.epoch + 1,
            changed_at=now,
        )
        await self._commit(changed, fact("user.password_changed", user.id, user.id, now, tenant=user.tenant))
        self._verified.forget(user.id)

    async def reset_password(self, actor: Actor, username: str) -> str:
        """Give a user a new one-time password, where theirs is lost, and return it, this once. Their access tokens end.

        Raises:
            NotFound: there is no such user.
            Forbidden: the actor is no administrator.
        """
        allow(actor, "users.reset_password")
        user = await self._find(_name(username))
        if user is None:
            raise NotFound("there is no such user")
        password = one_time_password()
        digest = await self._passwords.hash(password)
        now = self._clock.now()
        changed = msgspec.structs.replace(
            user,
            version=user.version + 1,
            password_hash=digest,
            must_change=True,
            epoch=user.epoch + 1,
            changed_at=now,
        )
        await self._commit(changed, fact("user.password_reset", user.id, actor.id, now, tenant=user.tenant))
        self._verified.forget(user.id)
        return password

    async def _find(self, name: str) -> User | None:
        where = (Where("name", "eq", name), Where("tenant", "eq", DEFAULT_TENANT))
        found = await self._store.find(USER_KIND.name, Query(where=where, limit=1))
        return to_user(found[0]) if found else None

    async def _check(self, username: str, password: str, address: str) -> User:
        name = _name(username)
        await self._throttle.attempt(name, address, self._clock.now())
        user = await self._find(name)
        right = await self._passwords.verify(user.password_hash if user else None, password)
        if user is None or not right or user.disabled:
            raise InvalidToken("wrong user name or password")
        await self._throttle.succeeded(name, address)
        return user

    # --- API tokens -----------------------------------------------------------------------------------------------

    async def create_token(
        self, actor: Actor, name: str, expires_in_seconds: int | None = None
    ) -> tuple[ApiToken, str]:
        """Give the actor a token for programs; returns its record and the token itself, which is shown this once.

        Raises:
            Invalid: a bad name or life, or `limit-exceeded` with more than 100 tokens.
            Forbidden: the actor is not a user.
        """
        allow(actor, "tokens.create")
        _check_label(name)
        if expires_in_seconds is not None and not 60 <= expires_in_seconds <= MAX_TOKEN_SECONDS:
            raise field_error("#/expires_in_seconds", "out-of-range", f"60 to {MAX_TOKEN_SECONDS} seconds")
        if len(await self.list_tokens(actor)) >= MAX_TOKENS:
            raise field_error("#/name", "limit-exceeded", f"at most {MAX_TOKENS} tokens per user: revoke one")
        now = self._clock.now()
        secret = self._ids.secret()
        token = ApiToken(
            id=self._ids.new(opaque.noun("mcpt")),
            version=1,
            tenant=actor.tenant,
            owner=actor.id,
            name=name,
            digest=opaque.digest(secret),
            created_at=now,
            expires_at=None if expires_in_seconds is None else now + expires_in_seconds * 1000,
        )
        await self._commit(token, fact("token.created", token.id, actor.id, now, {"name": name}, tenant=actor.tenant))
        return token, opaque.write("mcpt", token.id, secret)

    async def list_tokens(self, actor: Actor) -> list[ApiToken]:
        """Return the actor's tokens that were not revoked, oldest first."""
        allow(actor, "tokens.list")
        where = (Where("owner", "eq", actor.id),)
        return [
            to_api_token(entity)
            for entity in await self._store.find(API_TOKEN_KIND.name, Query(where=where, limit=2 * MAX_TOKENS))
        ]

    async def revoke_token(self, actor: Actor, id: str) -> None:
        """End one of the actor's tokens. Ending it twice is a no-op. Raises NotFound for a token that is not the actor's."""
        allow(actor, "tokens.revoke", id)
        for _ in range(_TRIES):
            (found,) = await self._store.get(API_TOKEN_KIND.name, [id])
            token = None if found is None else to_api_token(found)
            if token is None or token.owner != actor.id:
                raise NotFound
            if token.revoked_at is not None:
                return
            now = self._clock.now()
            ended = msgspec.structs.replace(token, version=token.version + 1, revoked_at=now)
            with contextlib.suppress(Conflict):  # its use is being noted
                await self._commit(ended, fact("token.revoked", id, actor.id, now, tenant=actor.tenant))
                self._verified.forget(id)
                return
        raise Conflict("the token is being changed by others", retry_after=1)

    async def _commit(self, record: Record, entry: Fact) -> None:
        await self._apply(Change(writes=(to_entity(record),), facts=(entry,)))

    async def _apply(self, change: Change) -> None:
        (problem,) = await self._store.commit([change])
        if problem is not None:
            raise problem


def _name(username: str) -> str:
    """Return the form of a login name that is stored and looked for; over-long ones are cut, they match nobody."""
    return unicodedata.normalize("NFC", username.strip()).casefold()[:256]


def _check_label(name: str) -> None:
    if not 1 <= len(name) <= 100:
        raise field_error("#/name", "out-of-range", "1 to 100 characters")
    if not name.isprintable():
        raise field_error("#/name", "invalid-character", "printable characters only")
