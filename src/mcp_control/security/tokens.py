"""Access tokens: short-lived JWTs with an Ed25519 signature (RFC 7519, 8725, 9068; algorithm name of RFC 9864).

A token names the user and the epoch it was given in, nothing else: roles are read from the user's record, so a change holds at once.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from mcp_control.kernel.changes import Change
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, InvalidToken, OutcomeUnknown, StoreUnavailable
from mcp_control.kernel.ids import IdSource
from mcp_control.security.records import SIGNING_KEY_KIND, SigningKey, to_entity, to_signing_key
from mcp_control.storage.ports import Store

ALGORITHM: Final = "Ed25519"
TYPE: Final = "at+jwt"
MAX_BYTES: Final = 8 * 1024
MIN_SECRET_CHARS: Final = 32
_KEY_FILE: Final = "jwt-key"
_SHARED_KEY: Final = "access-token"
_TRIES: Final = 10
_HEADERS: Final = frozenset({"alg", "typ", "kid"})


class Claims(msgspec.Struct, frozen=True):
    """What a valid token says: the user, the user's epoch, the token's own id, and when it ends (wall milliseconds)."""

    subject: str
    epoch: int
    token_id: str
    expires_at: int


class AccessTokens:
    """Issues and verifies access tokens.

    Args:
        seed: the 32 bytes of the Ed25519 private key, from `signing_seed` or `shared_seed`.
        life_seconds: how long a token holds, 300 to 900.
        leeway_seconds: what clocks may differ, at most 30.
    """

    def __init__(
        self,
        seed: bytes,
        *,
        issuer: str = "mcp-control",
        audience: str = "mcp-control-api",
        life_seconds: int = 600,
        leeway_seconds: int = 10,
    ) -> None:
        if not (300 <= life_seconds <= 900 and 0 <= leeway_seconds <= 30):
            raise ValueError("a token lives 300 to 900 seconds, with a leeway of at most 30")
        self._key = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(seed))
        self._kid = self._key.thumbprint()
        self._issuer = issuer
        self._audience = audience
        self._leeway = leeway_seconds
        self.life_seconds = life_seconds

    def issue(self, subject: str, epoch: int, token_id: str, now: int) -> str:
        """Return a token that holds from `now` (wall milliseconds) for `life_seconds`."""
        at = now // 1000
        claims = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": subject,
            "iat": at,
            "exp": at + self.life_seconds,
            "jti": token_id,
            "epoch": epoch,
        }
        return jwt.encode({"alg": ALGORITHM, "typ": TYPE, "kid": self._kid}, claims, self._key, algorithms=[ALGORITHM])

    def verify(self, token: str, now: int) -> Claims:
        """Return what the token says, if it is one of ours and holds at `now`.

        The header never chooses anything: one algorithm, one key, one type; parameters that bring keys along are refused.

        Raises:
            InvalidToken: in every other case, without saying which.
        """
        if len(token) > MAX_BYTES:
            raise InvalidToken
        try:
            decoded = jwt.decode(token, self._key, algorithms=[ALGORITHM])
            header, claims = decoded.header, decoded.claims
            if header.get("typ") != TYPE or header.get("kid") != self._kid or not _HEADERS.issuperset(header):
                raise InvalidToken
            jwt.JWTClaimsRegistry(
                now=now // 1000,
                leeway=self._leeway,
                iss={"essential": True, "value": self._issuer},
                aud={"essential": True, "value": self._audience},
                sub={"essential": True},
                exp={"essential": True},
                iat={"essential": True},
                jti={"essential": True},
            ).validate(claims)
            subject, epoch, expires = claims["sub"], claims.get("epoch"), claims["exp"]
            # Ours are whole numbers and one audience; and nothing we sign lives longer than this.
            if (
                type(epoch) is not int
                or type(expires) is not int
                or type(claims["iat"]) is not int
                or claims["aud"] != self._audience
                or expires - claims["iat"] > 900
            ):
                raise InvalidToken
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidToken from error
        return Claims(subject, epoch, claims["jti"], (expires + self._leeway) * 1000)


def secret_seed(secret: str) -> bytes:
    """Return the private key that the operator's secret leads to.

    Args:
        secret: `JWT_SECRET`; at least 32 characters. Several servers with the same secret accept each other's tokens.

    Raises:
        StoreUnavailable: the secret is too weak; the message says what to do.
    """
    if len(secret) < MIN_SECRET_CHARS or len(set(secret)) < 8:
        raise StoreUnavailable(
            f"JWT_SECRET is too weak: give at least {MIN_SECRET_CHARS} random characters, for example from `openssl rand -hex 32`"
        )
    return HKDF(SHA256(), 32, salt=None, info=b"mcp-control access token Ed25519 v1").derive(secret.encode())


async def shared_seed(store: Store, ids: IdSource, clock: Clock) -> bytes:
    """Return the private key of all servers of a store; the first one that starts makes it, and of several at once one.

    Args:
        store: open, with the kinds of this component.
        ids: where the key's random bytes come from.

    Raises:
        StoreUnavailable, OutcomeUnknown, StorageFull, Overloaded: as `Store.get` and `Store.commit`.
    """
    doubt: OutcomeUnknown | None = None
    for _ in range(_TRIES):
        (found,) = await store.get(SIGNING_KEY_KIND.name, [_SHARED_KEY])
        if found is not None:
            return to_signing_key(found).seed
        made = SigningKey(id=_SHARED_KEY, version=1, seed=ids.bytes16() + ids.bytes16(), created_at=clock.now())
        try:
            (problem,) = await store.commit([Change(writes=(to_entity(made),))])
        except OutcomeUnknown as error:
            doubt = error
            continue
        if problem is not None and not isinstance(problem, Conflict):
            raise problem
    raise doubt or StoreUnavailable("the store gives no signing key")


def signing_seed(secret: str | None, folder: Path) -> bytes:
    """Return the private key of a single server: from the operator's secret when there is one, else from a file in the data folder.

    Args:
        secret: `JWT_SECRET`, see `secret_seed`.
        folder: the data folder, which exists; the file is made when it is absent and has mode 0600.

    Raises:
        StoreUnavailable: the secret is too weak or the key file cannot be trusted; the message says what to do.
    """
    if secret is not None:
        return secret_seed(secret)
    path = folder / _KEY_FILE
    with contextlib.suppress(FileNotFoundError):
        return _read_key(path)
    _write_key(path, os.urandom(32))
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise StoreUnavailable(
                f"{path} can be read by other users: remove it, a new key is made (everybody logs in again)"
            )
        key = os.read(descriptor, 64)
    finally:
        os.close(descriptor)
    if len(key) != 32:
        raise StoreUnavailable(f"{path} is not a key: remove it, a new one is made (everybody logs in again)")
    return key


def _write_key(path: Path, key: bytes) -> None:
    """Write under another name and link it in place, so that a crash leaves no half key and nobody's key is replaced."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(descriptor, key)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()
