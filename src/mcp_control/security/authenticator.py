"""One way in for all doors: an Authorization header becomes an actor, or a refusal that tells nothing."""

import asyncio
from contextlib import suppress
from typing import Final

import msgspec

from mcp_control.kernel.background import Background
from mcp_control.kernel.changes import Change
from mcp_control.kernel.errors import InvalidToken, Problem, Unauthenticated
from mcp_control.security import opaque
from mcp_control.security.model import Actor
from mcp_control.security.policy import AGENT
from mcp_control.security.records import (
    API_TOKEN_KIND,
    CREDENTIAL_KIND,
    USER_KIND,
    ApiToken,
    User,
    to_api_token,
    to_credential,
    to_entity,
    to_user,
)
from mcp_control.security.tokens import MAX_BYTES, AccessTokens
from mcp_control.security.verified import VerifiedCache
from mcp_control.storage.ports import Store

_USED_EVERY_MS: Final = 600_000
_NOTE_SECONDS: Final = 0.25
_NOBODY: Final = bytes(32)


class Authenticator:
    """Knows access tokens (JWT), API tokens (`mcpt_…`) and agent credentials (`mcpa_…`)."""

    def __init__(self, store: Store, tokens: AccessTokens, verified: VerifiedCache) -> None:
        self._store = store
        self._tokens = tokens
        self._verified = verified
        self._writing = Background("tokens-used")

    def known(self, header: str, now: int) -> Actor | None:
        """Return the actor of a header that was verified within the last seconds, without waiting."""
        return self._verified.get(header, now)

    async def authenticate(self, header: str | None, now: int) -> Actor:
        """Return who presents this Authorization header.

        Args:
            header: its value, `Bearer …`; None or blank where there was none.
            now: wall milliseconds.

        Raises:
            Unauthenticated: nothing was presented.
            InvalidToken: what was presented is not valid now. Why is not told.
        """
        if not header or header.isspace():
            raise Unauthenticated
        actor = self._verified.get(header, now)
        if actor is None:
            actor = await self._verify(_bearer(header), now)
            self._verified.put(header, actor, now)
        return actor

    async def _verify(self, token: str, now: int) -> Actor:
        presented = opaque.parse(token)
        if presented is None:
            return await self._access_token(token, now)
        match presented.kind:
            case "mcpt":
                return await self._api_token(presented, now)
            case "mcpa":
                return await self._agent(presented)
            case _:  # an enrolment token opens nothing but registration, where it is redeemed
                raise InvalidToken

    async def _access_token(self, token: str, now: int) -> Actor:
        claims = self._tokens.verify(token, now)
        user = await self._user(claims.subject)
        if claims.epoch != user.epoch:
            raise InvalidToken
        return _actor(user, "user", claims.token_id, claims.expires_at)

    async def _api_token(self, presented: opaque.Opaque, now: int) -> Actor:
        (found,) = await self._store.get(API_TOKEN_KIND.name, [presented.id])
        token = None if found is None else to_api_token(found)
        right = opaque.same(presented.digest, token.digest if token else _NOBODY)
        if (
            token is None
            or not right
            or token.revoked_at is not None
            or (token.expires_at is not None and now >= token.expires_at)
        ):
            raise InvalidToken
        user = await self._user(token.owner)
        await self._note_use(token, now)
        return _actor(user, "token", token.id, token.expires_at)

    async def _agent(self, presented: opaque.Opaque) -> Actor:
        (found,) = await self._store.get(CREDENTIAL_KIND.name, [presented.id])
        credential = None if found is None else to_credential(found)
        right = opaque.same(presented.digest, credential.digest if credential else _NOBODY)
        if credential is None or not right or credential.revoked_at is not None:
            raise InvalidToken
        return Actor(
            id=credential.agent_id,
            kind="agent",
            tenant=credential.tenant,
            display=credential.name,
            roles=(AGENT,),
            credential=credential.id,
            on_behalf_of=credential.created_by,
        )

    async def _user(self, id: str) -> User:
        (found,) = await self._store.get(USER_KIND.name, [id])
        if found is None:
            raise InvalidToken
        user = to_user(found)
        if user.disabled:
            raise InvalidToken
        return user

    async def _note_use(self, token: ApiToken, now: int) -> None:
        """Write down that the token is in use, coarsely, since a write per request would cost more than it tells."""
        if token.last_used_at is not None and now - token.last_used_at < _USED_EVERY_MS:
            return
        used = msgspec.structs.replace(token, version=token.version + 1, last_used_at=now)
        writing = self._writing.begin(self._write(used))
        # A store that takes its time with writes, or takes none, must not keep anybody from what they came for.
        await asyncio.wait([writing], timeout=_NOTE_SECONDS)

    async def _write(self, token: ApiToken) -> None:
        with suppress(Problem):
            await self._store.commit([Change(writes=(to_entity(token),))])


def _actor(user: User, kind: str, credential: str, expires_at: int | None) -> Actor:
    return Actor(
        id=user.id,
        kind="user" if kind == "user" else "token",
        tenant=user.tenant,
        display=user.name,
        roles=user.roles,
        credential=credential,
        expires_at=expires_at,
    )


def _bearer(header: str) -> str:
    scheme, _, token = header.strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > MAX_BYTES or not token.isascii():
        raise InvalidToken
    return token
