"""What the store keeps about users and credentials. Secrets themselves are never kept: passwords as argon2id, the rest as SHA-256."""

from typing import Final

import msgspec

from mcp_control.kernel.changes import Entity, Field, Index, IndexValue, Kind
from mcp_control.security.model import DEFAULT_TENANT


class User(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A person who logs in.

    Attributes:
        name: the login name, normalised; unique per tenant.
        epoch: raised when all access tokens given so far must end (password change); a token carries the epoch it was given in.
        must_change: the password is meant for one use, and logging in with it leads only to setting another.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    name: str
    roles: tuple[str, ...] = ()
    password_hash: str
    must_change: bool = False
    disabled: bool = False
    epoch: int = 1
    created_at: int
    changed_at: int = 0


class ApiToken(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A user's token for programs. It may do what its owner may. `digest` is the SHA-256 of the secret."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    owner: str
    name: str
    digest: bytes
    created_at: int
    expires_at: int | None = None
    last_used_at: int | None = None
    revoked_at: int | None = None


class AgentCredential(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an agent proves its identity with. `digest` is the SHA-256 of the secret."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    agent_id: str
    name: str
    digest: bytes
    created_at: int
    created_by: str
    revoked_at: int | None = None


class Enrolment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A short-lived permission to register agents. `name`, when set, is the only agent name it serves."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    name: str = ""
    digest: bytes
    created_at: int
    created_by: str
    expires_at: int
    uses_left: int = 1


USER_KIND: Final = Kind(
    name="user",
    fields=(Field("tenant"), Field("name")),
    indexes=(Index("user_name", ("name", "tenant"), unique=True),),
)
API_TOKEN_KIND: Final = Kind(
    name="api_token",
    fields=(Field("owner"),),
    indexes=(Index("api_token_owner", ("owner", "id")),),
)
CREDENTIAL_KIND: Final = Kind(
    name="credential",
    fields=(Field("agent"),),
    indexes=(Index("credential_agent", ("agent", "id")),),
)
ENROLMENT_KIND: Final = Kind(
    name="enrolment",
    fields=(Field("expires", "int"),),
    indexes=(Index("enrolment_expires", ("expires", "id")),),
)
KINDS: Final = (USER_KIND, API_TOKEN_KIND, CREDENTIAL_KIND, ENROLMENT_KIND)

_encode: Final = msgspec.msgpack.Encoder().encode
_user: Final = msgspec.msgpack.Decoder(User)
_api_token: Final = msgspec.msgpack.Decoder(ApiToken)
_credential: Final = msgspec.msgpack.Decoder(AgentCredential)
_enrolment: Final = msgspec.msgpack.Decoder(Enrolment)

Record = User | ApiToken | AgentCredential | Enrolment


def to_entity(record: Record) -> Entity:
    """Return the record for a `Change`: it replaces the version before its own."""
    kind, index = _place(record)
    return Entity(kind.name, record.id, record.version - 1, index, _encode(record))


def _place(record: Record) -> tuple[Kind, dict[str, IndexValue]]:
    match record:
        case User():
            return USER_KIND, {"tenant": record.tenant, "name": record.name}
        case ApiToken():
            # A revoked one stays for the record, and out of its owner's list.
            return API_TOKEN_KIND, {"owner": record.owner if record.revoked_at is None else None}
        case AgentCredential():
            return CREDENTIAL_KIND, {"agent": record.agent_id if record.revoked_at is None else None}
        case Enrolment():
            return ENROLMENT_KIND, {"expires": record.expires_at}


def to_user(entity: Entity) -> User:
    """Return the user an entity holds."""
    return _user.decode(entity.hot)


def to_api_token(entity: Entity) -> ApiToken:
    """Return the API token an entity holds."""
    return _api_token.decode(entity.hot)


def to_credential(entity: Entity) -> AgentCredential:
    """Return the agent credential an entity holds."""
    return _credential.decode(entity.hot)


def to_enrolment(entity: Entity) -> Enrolment:
    """Return the enrolment an entity holds."""
    return _enrolment.decode(entity.hot)
