"""Routes of `/auth`: login, passwords, API tokens, and who one is."""

from datetime import datetime
from typing import Final

import msgspec

from mcp_control.api.call import NO_CONTENT, Call, Reply, reply
from mcp_control.api.decode import Body
from mcp_control.api.routing import Endpoint
from mcp_control.kernel.clock import to_datetime
from mcp_control.kernel.errors import Problem, RateLimited
from mcp_control.security.records import ApiToken


class Login(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A name and a password."""

    username: str
    password: str


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """An access token and the seconds it holds."""

    access_token: str
    token_type: str = "Bearer"  # noqa: S105 - the name of the scheme
    expires_in: int


class PasswordChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new password, authenticated by the current one."""

    username: str
    current_password: str
    new_password: str


class Me(msgspec.Struct, frozen=True, kw_only=True):
    """Who a credential stands for."""

    id: str
    kind: str
    display: str
    tenant: str
    roles: list[str]
    expires_at: datetime | None


class TokenRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token for a program; without a life it holds until it is revoked."""

    name: str
    expires_in_seconds: int | None = None


class TokenView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An API token. `token` is there once, in the answer that creates it."""

    id: str
    name: str
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    token: str | None = None


class TokenList(msgspec.Struct, frozen=True, kw_only=True):
    """All tokens of the caller."""

    items: list[TokenView]
    next_cursor: str | None = None


_LOGIN: Final = Body(Login, unique_keys=True)
_PASSWORD: Final = Body(PasswordChange, unique_keys=True)
_TOKEN: Final = Body(TokenRequest, unique_keys=True)


def _address(call: Call) -> str:
    client = call.scope["client"]
    return client[0] if client else ""


def _moment(millis: int | None) -> datetime | None:
    return None if millis is None else to_datetime(millis)


def _view(token: ApiToken, secret: str | None = None) -> TokenView:
    return TokenView(
        id=token.id,
        name=token.name,
        created_at=to_datetime(token.created_at),
        expires_at=_moment(token.expires_at),
        last_used_at=_moment(token.last_used_at),
        token=secret,
    )


async def login(call: Call) -> Reply:
    """Give a short-lived access token for a name and a password."""
    given = await call.decode(_LOGIN)
    count = call.services.metrics.login
    try:
        session = await call.services.accounts.login(given.username, given.password, _address(call))
    except RateLimited:
        count("throttled")
        raise
    except Problem as problem:
        if problem.status < 500:
            count("refused")
        raise
    count("accepted")
    return reply(Access(access_token=session.access_token, expires_in=session.expires_in))


async def password(call: Call) -> Reply:
    """Set a new password; the way out of a password that is meant for one use."""
    given = await call.decode(_PASSWORD)
    await call.services.accounts.change_password(
        given.username, given.current_password, given.new_password, _address(call)
    )
    return NO_CONTENT


async def me(call: Call) -> Reply:
    """Say who the caller is."""
    actor = call.actor
    return reply(
        Me(
            id=actor.id,
            kind=actor.kind,
            display=actor.display,
            tenant=actor.tenant,
            roles=list(actor.roles),
            expires_at=_moment(actor.expires_at),
        )
    )


async def list_tokens(call: Call) -> Reply:
    """List the caller's API tokens."""
    return reply(TokenList(items=[_view(token) for token in await call.services.accounts.list_tokens(call.actor)]))


async def create_token(call: Call) -> Reply:
    """Make an API token; its secret is in this answer and nowhere else."""
    wanted = await call.decode(_TOKEN)
    token, secret = await call.services.accounts.create_token(call.actor, wanted.name, wanted.expires_in_seconds)
    return reply(_view(token, secret), 201)


async def revoke_token(call: Call) -> Reply:
    """End an API token at once."""
    await call.services.accounts.revoke_token(call.actor, call.params["token_id"])
    return NO_CONTENT


ENDPOINTS: Final = (
    Endpoint(
        method="POST", path="/auth/login", handler=login, summary="Log in", tag="auth", access="open", body=_LOGIN, returns=Access,
        example={"username": "admin", "password": "correct horse battery staple"},
    ),
    Endpoint(
        method="POST", path="/auth/password", handler=password, summary="Set a new password", tag="auth",
        access="open", body=_PASSWORD, status=204,
        example={"username": "admin", "current_password": "the-printed-one", "new_password": "correct horse battery staple"},
    ),
    Endpoint(method="GET", path="/auth/me", handler=me, summary="Who am I", tag="auth", returns=Me),
    Endpoint(method="GET", path="/auth/tokens", handler=list_tokens, summary="List API tokens", tag="auth", returns=TokenList),
    Endpoint(
        method="POST", path="/auth/tokens", handler=create_token, summary="Create an API token", tag="auth",
        body=_TOKEN, returns=TokenView, status=201,
        example={"name": "nightly-import", "expires_in_seconds": 86400},
    ),
    Endpoint(method="DELETE", path="/auth/tokens/{token_id}", handler=revoke_token, summary="Revoke an API token", tag="auth", status=204),
)  # fmt: skip
