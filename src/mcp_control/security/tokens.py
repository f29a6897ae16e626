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

from mcp_control.kernel.errors import InvalidToken, StoreUnavailable

ALGORITHM: Final = "Ed25519"
TYPE: Final = "at+jwt"
MAX_BYTES: Final = 8 * 1024
MIN_SECRET_CHARS: Final = 32
_KEY_FILE: Final = "jwt-key"
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
        seed: the 32 bytes of the Ed25519 private key, from `signing_seed`.
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


def signing_seed(secret: str | None, folder: Path) -> bytes:
    """Return the private key: derived from the operator's secret when there is one, else from a file made for it in the data folder.

    Args:
        secret: `JWT_SECRET`; at least 32 characters. Several servers with the same secret accept each other's tokens.
        folder: the data folder, which exists; the file has mode 0600.

    Raises:
        StoreUnavailable: the secret is too short or the key file cannot be trusted; the message says what to do.
    """
    if secret is not None:
        if len(secret) < MIN_SECRET_CHARS or len(set(secret)) < 8:
            raise StoreUnavailable(
                f"JWT_SECRET is too weak: give at least {MIN_SECRET_CHARS} random characters, for example from `openssl rand -hex 32`"
            )
        return HKDF(SHA256(), 32, salt=None, info=b"mcp-control access token Ed25519 v1").derive(secret.encode())
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
