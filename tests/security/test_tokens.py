"""Access tokens: only what this server signed, for this purpose, at this time."""

import asyncio
import base64
import hmac
import json
from pathlib import Path
from random import Random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.jwk import OKPKey

from mcp_control.kernel.errors import InvalidToken, StoreUnavailable
from mcp_control.kernel.ids import IdSource
from mcp_control.security.records import to_signing_key
from mcp_control.security.tokens import AccessTokens, shared_seed, signing_seed
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.testing.clock import FakeClock
from mcp_control.testing.faulty_store import Fault, FaultyStore

NOW = 1_800_000_000_000
AT = NOW // 1000
SEED = bytes(range(32))
KEY = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(SEED))
OTHER = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(bytes(32)))
HEADER: dict[str, object] = {"alg": "Ed25519", "typ": "at+jwt", "kid": KEY.thumbprint()}
CLAIMS: dict[str, object] = {
    "iss": "mcp-control",
    "aud": "mcp-control-api",
    "sub": "user_1",
    "iat": AT,
    "exp": AT + 600,
    "jti": "session_1",
    "epoch": 1,
}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: dict[str, object] | None = None, key: OKPKey = KEY, without: str = "", **claims: object) -> str:
    """A token that is right but for what is named."""
    said = {**CLAIMS, **claims}
    said.pop(without, None)
    return raw({**HEADER, **(header or {})}, json.dumps(said).encode(), key)


def raw(header: dict[str, object], payload: bytes, key: OKPKey = KEY) -> str:
    """Sign any payload under any header with Ed25519, as a library with checks would not."""
    head = f"{b64(json.dumps(header).encode())}.{b64(payload)}"
    private = key.private_key
    assert isinstance(private, Ed25519PrivateKey)
    return f"{head}.{b64(private.sign(head.encode()))}"


def hmac_with_public_key() -> str:
    """The classic confusion: the public key's text as an HMAC secret."""
    head = f"{b64(json.dumps({**HEADER, 'alg': 'HS256'}).encode())}.{b64(json.dumps(CLAIMS).encode())}"
    return f"{head}.{b64(hmac.digest(KEY.as_pem(private=False), head.encode(), 'sha256'))}"


def with_signature(token: str, signature: str) -> str:
    return f"{token.rpartition('.')[0]}.{signature}"


def encrypted_looking() -> str:
    return ".".join(
        [
            b64(json.dumps({"alg": "dir", "enc": "A256GCM", "typ": "at+jwt"}).encode()),
            "",
            b64(b"x" * 12),
            b64(b"y"),
            b64(b"z" * 16),
        ]
    )


def nested(depth: int) -> bytes:
    return b'{"sub":' + b"[" * depth + b"]" * depth + b"}"


VALID = signed()
BAD = {
    "empty": "",
    "garbage": "garbage",
    "dots": "..",
    "two parts": VALID.rpartition(".")[0],
    "four parts": VALID + ".x",
    "not base64": "!!.!!.!!",
    "not ascii": VALID + "é",
    "alg none": with_signature(raw({**HEADER, "alg": "none"}, json.dumps(CLAIMS).encode()), ""),
    "alg None with signature": raw({**HEADER, "alg": "None"}, json.dumps(CLAIMS).encode()),
    "no alg": raw({"typ": "at+jwt", "kid": KEY.thumbprint()}, json.dumps(CLAIMS).encode()),
    "alg is a list": signed({"alg": ["Ed25519"]}),
    "HS256 with the public key": hmac_with_public_key(),
    "alg EdDSA (deprecated name)": signed({"alg": "EdDSA"}),
    "alg ES256": signed({"alg": "ES256"}),
    "typ JWT": signed({"typ": "JWT"}),
    "refresh-typed": signed({"typ": "rt+jwt"}),
    "id token": signed({"typ": "id+jwt"}),
    "no typ": raw({"alg": "Ed25519", "kid": KEY.thumbprint()}, json.dumps(CLAIMS).encode()),
    "other key": signed(key=OTHER),
    "other kid": signed({"kid": "another"}),
    "no kid": raw({"alg": "Ed25519", "typ": "at+jwt"}, json.dumps(CLAIMS).encode()),
    "brings its key": signed({"jwk": OTHER.as_dict(private=False)}, key=OTHER),
    "brings its key, signed by ours": signed({"jwk": KEY.as_dict(private=False)}),
    "jku": signed({"jku": "https://attacker.example/keys"}),
    "x5u": signed({"x5u": "https://attacker.example/cert"}),
    "crit": signed({"crit": ["exp"], "exp": AT + 600}),
    "b64 false": signed({"b64": False, "crit": ["b64"]}),
    "no signature": with_signature(VALID, ""),
    "flipped signature": with_signature(VALID, b64(bytes(64))),
    "changed claims": with_signature(signed(sub="user_2"), VALID.rpartition(".")[2]),
    "expired": signed(exp=AT - 11, iat=AT - 611),
    "expired long ago": signed(exp=1, iat=0),
    "no exp": signed(without="exp"),
    "exp as text": signed(exp=str(AT + 600)),
    "exp fraction": signed(exp=AT + 600.5),
    "exp NaN": raw(HEADER, json.dumps({**CLAIMS, "exp": float("nan")}).encode()),
    "exp infinite": raw(HEADER, json.dumps({**CLAIMS, "exp": float("inf")}).encode()),
    "exp true": signed(exp=True),
    "exp null": signed(exp=None),
    "lives for a year": signed(exp=AT + 31_536_000),
    "issued in the future": signed(iat=AT + 60, exp=AT + 660),
    "not before later": signed(nbf=AT + 60),
    "no iat": signed(without="iat"),
    "wrong aud": signed(aud="another-service"),
    "aud among others": signed(aud=["mcp-control-api", "another-service"]),
    "no aud": signed(without="aud"),
    "wrong iss": signed(iss="https://attacker.example"),
    "no iss": signed(without="iss"),
    "no sub": signed(without="sub"),
    "sub a number": signed(sub=7),
    "sub a list": signed(sub=["user_1"]),
    "no jti": signed(without="jti"),
    "jti a number": signed(jti=1),
    "no epoch": signed(without="epoch"),
    "epoch as text": signed(epoch="1"),
    "epoch true": signed(epoch=True),
    "claims are a list": raw(HEADER, b"[1]"),
    "claims are no JSON": raw(HEADER, b"{"),
    "claims are deep": raw(HEADER, nested(2500)),
    "claims are not UTF-8": raw(HEADER, b'{"sub":"\xff"}'),
    "header is a list": f"{b64(b'[]')}.{b64(json.dumps(CLAIMS).encode())}.{b64(bytes(64))}",
    "header is no JSON": f"{b64(b'{')}.{b64(json.dumps(CLAIMS).encode())}.{b64(bytes(64))}",
    "encrypted form": encrypted_looking(),
    "JSON form": json.dumps(jws.serialize_json({"protected": {"alg": "Ed25519"}}, b"{}", KEY, algorithms=["Ed25519"])),
    "oversize": signed(pad="x" * 8192),
}


def test_own_token_is_accepted_and_says_who() -> None:
    """The helper above signs what the server itself would accept, so that each bad token fails for its one fault."""
    tokens = AccessTokens(SEED)
    for token in (VALID, tokens.issue("user_1", 1, "session_1", NOW)):
        claims = tokens.verify(token, NOW)
        assert (claims.subject, claims.epoch, claims.token_id) == ("user_1", 1, "session_1")
        assert claims.expires_at == NOW + 610_000


@pytest.mark.parametrize("name", BAD)
def test_bad_token_is_refused_without_a_reason(name: str) -> None:
    """Whatever is wrong, the answer is the same."""
    with pytest.raises(InvalidToken) as caught:
        AccessTokens(SEED).verify(BAD[name], NOW)
    assert caught.value.detail == InvalidToken.title
    assert not caught.value.data


def test_table_of_bad_tokens_is_long_and_without_repetition() -> None:
    """At least 27, each different."""
    assert len(set(BAD.values())) == len(BAD) >= 27


def test_token_ends_when_it_says() -> None:
    """It holds up to its end and the leeway, and not a second longer."""
    tokens = AccessTokens(SEED, life_seconds=300, leeway_seconds=30)
    token = tokens.issue("user_1", 1, "s", NOW)
    tokens.verify(token, NOW - 30_000)
    tokens.verify(token, NOW + 329_000)
    for moment in (NOW + 330_000, NOW - 31_000):
        with pytest.raises(InvalidToken):
            tokens.verify(token, moment)


@pytest.mark.parametrize(("life", "leeway"), [(299, 0), (901, 0), (300, 31), (300, -1)])
def test_lives_and_leeways_outside_the_rules_are_refused(life: int, leeway: int) -> None:
    """Five to fifteen minutes, with at most 30 seconds for clocks."""
    with pytest.raises(ValueError, match="300 to 900"):
        AccessTokens(SEED, life_seconds=life, leeway_seconds=leeway)


def test_secret_leads_to_one_key_on_every_server(tmp_path: Path) -> None:
    """Servers with the same JWT_SECRET accept each other's tokens; another secret is another key; no file is made."""
    secret = "0123456789abcdef0123456789ABCDEF"
    seed = signing_seed(secret, tmp_path)
    assert seed == signing_seed(secret, tmp_path / "elsewhere")
    assert seed != signing_seed(secret + "x", tmp_path)
    assert len(seed) == 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("secret", ["", "short", "a" * 64, "changeme" * 3])
def test_weak_secret_ends_the_start(secret: str, tmp_path: Path) -> None:
    """A guessable secret would let anybody sign."""
    with pytest.raises(StoreUnavailable, match="JWT_SECRET"):
        signing_seed(secret, tmp_path)


def test_generated_key_is_private_and_stays(tmp_path: Path) -> None:
    """Without a secret a key is made once, readable by its owner alone; one that others can read is not used."""
    seed = signing_seed(None, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert signing_seed(None, tmp_path) == seed
    file.chmod(0o640)
    with pytest.raises(StoreUnavailable, match="other users"):
        signing_seed(None, tmp_path)
    file.chmod(0o600)
    file.write_bytes(b"short")
    with pytest.raises(StoreUnavailable, match="not a key"):
        signing_seed(None, tmp_path)


async def test_servers_of_one_store_agree_on_one_key(store: SqliteStore, clock: FakeClock) -> None:
    """Several that start at once, and those that start later, sign with the same 32 bytes; no text shows them."""
    seeds = await asyncio.gather(*(shared_seed(store, IdSource(clock), clock) for _ in range(8)))
    assert len(set(seeds)) == 1
    assert len(seeds[0]) == 32
    assert await shared_seed(store, IdSource(clock), clock) == seeds[0]
    token = AccessTokens(seeds[0]).issue("user_1", 1, "s", NOW)
    assert AccessTokens(seeds[-1]).verify(token, NOW).subject == "user_1"
    (found,) = await store.get("signing_key", ["access-token"])
    assert found is not None
    assert repr(seeds[0])[2:-1] not in repr(to_signing_key(found))


@pytest.mark.parametrize("fault", ["executed", "lost", "conflict"])
async def test_a_key_whose_making_is_in_doubt_is_looked_for(store: SqliteStore, clock: FakeClock, fault: Fault) -> None:
    """When the store does not know whether it kept the key, the server reads again, and never signs with another one."""
    faulty = FaultyStore(store, {fault: 0.5}, Random(3))
    seeds = {await shared_seed(faulty, IdSource(clock), clock) for _ in range(5)}
    assert faulty.injected[fault] > 0
    assert seeds == {await shared_seed(store, IdSource(clock), clock)}
