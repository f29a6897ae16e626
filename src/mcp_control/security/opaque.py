"""Opaque secrets: `mcpt_<id>_<secret>` (API token), `mcpa_…` (agent credential), `mcpe_…` (enrolment).

The id finds the record, the secret (256 random bits) proves the holder. The prefix tells scanners and log filters what they see.
Because the secret is random, one SHA-256 is enough: there is nothing to guess, so a slow hash would only cost.
"""

import hmac
import re
from hashlib import sha256
from typing import Final, Literal

import msgspec

OpaqueKind = Literal["mcpt", "mcpa", "mcpe"]
# The noun each prefix stands for in ids, so that a token carries no second prefix within.
_NOUNS: Final[dict[OpaqueKind, str]] = {"mcpt": "token", "mcpa": "cred", "mcpe": "enrol"}
_FORM: Final = re.compile(r"(mcp[tae])_([0-9a-v]{36})_([0-9a-f]{64})", re.ASCII)


class Opaque(msgspec.Struct, frozen=True):
    """A presented token, taken apart: which kind, the id of its record, the SHA-256 of its secret."""

    kind: OpaqueKind
    id: str
    digest: bytes


def noun(kind: OpaqueKind) -> str:
    """Return the prefix of record ids of this kind."""
    return _NOUNS[kind]


def write(kind: OpaqueKind, record_id: str, secret: str) -> str:
    """Return the token to hand out, once."""
    return f"{kind}_{record_id.rpartition('_')[2]}_{secret}"


def digest(secret: str) -> bytes:
    """Return what is stored of a secret."""
    return sha256(secret.encode()).digest()


def parse(text: str) -> Opaque | None:
    """Return the parts of a token, None for what is not one."""
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    prefix: OpaqueKind
    match found[1]:
        case "mcpt":
            prefix = "mcpt"
        case "mcpa":
            prefix = "mcpa"
        case _:
            prefix = "mcpe"
    return Opaque(prefix, f"{_NOUNS[prefix]}_{found[2]}", digest(found[3]))


def same(left: bytes, right: bytes) -> bool:
    """Compare two digests in a time that tells nothing of where they differ."""
    return hmac.compare_digest(left, right)
