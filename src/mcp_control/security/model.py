"""The actor: who calls a service verb. Every verb takes one, whichever door the call came through."""

from typing import Final, Literal

import msgspec

ActorKind = Literal["user", "agent", "token", "system"]
DEFAULT_TENANT: Final = "default"


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated caller.

    Attributes:
        id: `user_…`, `agent_…` or `system`.
        kind: what it is; `token` is a user's API token.
        tenant: whose data it works on.
        display: a name for people.
        roles: names of roles; the first layer knows `administrator`, `agent` and `system`.
        credential: id of the session, token or credential presented; never the secret.
        on_behalf_of: the user for whom an agent or program acts.
        expires_at: wall milliseconds at which the authentication ends; None where it does not by itself.
    """

    id: str
    kind: ActorKind
    tenant: str = DEFAULT_TENANT
    display: str = ""
    roles: tuple[str, ...] = ()
    credential: str = ""
    on_behalf_of: str | None = None
    expires_at: int | None = None


SYSTEM: Final = Actor(id="system", kind="system", display="system", roles=("system",))
