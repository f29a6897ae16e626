"""What the store keeps about users and credentials. Their secrets are never kept: passwords as argon2id, the rest as SHA-256.

The one secret that is kept is the key that servers of one store sign with, where `JWT_SECRET` does not give it.
"""

from typing import Final

import msgspec
from typing_extensions import override

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


class SigningKey(msgspec.Struct, frozen=True, kw_only=True):
    """The key of all servers of a store. `seed` is the 32 bytes of an Ed25519 private key; it stays out of every text."""

    id: str
    version: int
    seed: bytes
    created_at: int

    @override
    def __repr__(self) -> str:
        return f"SigningKey(id={self.id!r}, version={self.version})"


class LoginFailures(msgspec.Struct, frozen=True, kw_only=True):
    """A counter of failed logins, in wall milliseconds.

    Attributes:
        id: a hash of what is counted (an account, an address, or both).
        failures: in a row, without an hour of peace between them.
        last: the time of the last one.
        until: no attempt is allowed before.
        expires_at: from then on it is forgotten.
    """

    id: str
    version: int
    failures: int
    last: int
    until: int
    expires_at: int


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
SIGNING_KEY_KIND: Final = Kind(name="signing_key")
LOGIN_FAILURES_KIND: Final = Kind(
    name="login_failures",
    fields=(Field("expires", "int"),),
    indexes=(Index("login_failures_expires", ("expires", "id")),),
)
KINDS: Final = (
    USER_KIND,
    API_TOKEN_KIND,
    CREDENTIAL_KIND,
    ENROLMENT_KIND,
    SIGNING_KEY_KIND,
    LOGIN_FAILURES_KIND,
)

_encode: Final = msgspec.msgpack.Encoder().encode
_user: Final = msgspec.msgpack.Decoder(User)
_api_token: Final = msgspec.msgpack.Decoder(ApiToken)
_credential: Final = msgspec.msgpack.Decoder(AgentCredential)
_enrolment: Final = msgspec.msgpack.Decoder(Enrolment)
_signing_key: Final = msgspec.msgpack.Decoder(SigningKey)
_login_failures: Final = msgspec.msgpack.Decoder(LoginFailures)

Record = User | ApiToken | AgentCredential | Enrolment | SigningKey | LoginFailures


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
        case SigningKey():
            return SIGNING_KEY_KIND, {}
        case LoginFailures():
            return LOGIN_FAILURES_KIND, {"expires": record.expires_at}


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


def to_signing_key(entity: Entity) -> SigningKey:
    """Return the signing key an entity holds."""
    return _signing_key.decode(entity.hot)


def to_login_failures(entity: Entity) -> LoginFailures:
    """Return the counter an entity holds."""
    return _login_failures.decode(entity.hot)
