"""What a server would find on this machine and in its databases, and what to do about it. Part of the composition root.

Nothing is changed by looking: no folder is made, nothing is written to a database.
"""

import asyncio
import fcntl
import os
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import apsw
import msgspec
from cryptography import x509

from mcp_control.configuration.settings import Settings
from mcp_control.kernel.errors import Problem
from mcp_control.storage.sqlite.folder import filesystem_of, is_network

if TYPE_CHECKING:
    from mcp_control.storage.mongo.client import Client
    from mcp_control.storage.redis.connection import RedisClient

State = Literal["ok", "warn", "fail"]

_ROOM_WARN: Final = 1 << 30
_ROOM_FAIL: Final = 64 << 20
_SQLITE: Final = (3, 51, 3)
_REDIS: Final = (6, 2)
_SKEW_WARN_MS: Final = 1000.0
_SKEW_FAIL_MS: Final = 30_000.0
_TRANSACTION_SECONDS: Final = 60
_ROUND_TRIPS: Final = 5
_SECONDS: Final = 5.0
_EXPIRES: Final = timedelta(days=14)


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at: how it stands, what was seen, and what to do about it (empty when nothing)."""

    check: str
    state: State
    detail: str
    advice: str = ""


def checks(settings: Settings) -> Iterator[Check]:
    """Yield what is found, as it is found. Databases that do not answer cost a few seconds."""
    yield _sqlite()
    yield _folder(settings)
    yield _room(settings.data)
    yield _lock(settings)
    yield _port(settings)
    if settings.tls_cert is not None and settings.tls_key is not None:
        yield _tls(settings.tls_cert, settings.tls_key)
    if settings.mongo.uri is not None:
        yield _secret(settings)
        yield from asyncio.run(_databases(settings))


def _sqlite() -> Check:
    seen = f"{apsw.sqlite_lib_version()}, apsw {apsw.apsw_version()}"
    if tuple(map(int, apsw.sqlite_lib_version().split("."))) < _SQLITE:
        return Check(
            "sqlite",
            "fail",
            seen,
            "pip install -U apsw: SQLite before 3.51.3 can damage databases with a write-ahead log",
        )
    return Check("sqlite", "ok", seen)


# --- the data folder ------------------------------------------------------------------------------------------------


def _nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def _folder(settings: Settings) -> Check:
    data = settings.data
    near = _nearest(data)
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        return Check(
            "data folder", "fail", f"{near} cannot be written", f"chown it to user {os.getuid()}, or set data (--data)"
        )
    kind = filesystem_of(near)
    if settings.mongo.uri is None and is_network(kind):
        advice = "set data (--data) to a folder on a local disk: locks do not work over a network"
        return Check("data folder", "fail", f"{data} is on a network file system ({kind})", advice)
    if near != data.absolute():
        return Check("data folder", "ok", f"{data} (will be made)")
    if near.stat().st_mode & 0o077:
        return Check("data folder", "warn", f"{data} can be read by others", f"chmod 700 {data}")
    return Check("data folder", "ok", str(data))


def _room(data: Path) -> Check:
    free = shutil.disk_usage(_nearest(data)).free
    state: State = "fail" if free < _ROOM_FAIL else "warn" if free < _ROOM_WARN else "ok"
    advice = "" if state == "ok" else "free some space; a server refuses writes when there is none"
    return Check("disk", state, f"{free / 1e9:.1f} GB free", advice)


def _lock(settings: Settings) -> Check:
    """Say who uses the folder. The lock is tried and given back at once."""
    try:
        with (settings.data / "lock").open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check(
                    "data folder in use", "ok", f"a server runs on it (process {file.read(32).strip() or 'unknown'})"
                )
    except OSError:
        pass
    return Check("data folder in use", "ok", "no server runs on it")


# --- where it listens -----------------------------------------------------------------------------------------------


def _port(settings: Settings) -> Check:
    host, port = settings.host.strip("[]"), settings.port
    if port == 0:
        return Check("port", "ok", "a free one is taken")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        version = _version_of(settings)
        if version:
            return Check("port", "ok", f"{host}:{port}: a server answers, version {version}")
        why = f"{host}:{port}: {error.strerror or error}, and no server of ours answers there"
        return Check("port", "fail", why, "choose another port (--port; 0 takes a free one), or end the other program")
    return Check("port", "ok", f"{host}:{port} is free")


def _version_of(settings: Settings) -> str:
    """Return the version of the server that listens where this one would; empty when none of ours does."""
    import http.client

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host.strip("[]"), settings.host.strip("[]"))  # noqa: S104  # compared, not bound
    try:
        if settings.tls_cert is None:
            line = http.client.HTTPConnection(host, settings.port, timeout=_SECONDS)
        else:
            # It is this machine's own server that is asked for its version; its certificate is looked at elsewhere.
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            line = http.client.HTTPSConnection(host, settings.port, timeout=_SECONDS, context=context)
        try:
            line.request("GET", "/openapi.json")
            told = msgspec.json.decode(line.getresponse().read())
            return str(told["info"]["version"])
        finally:
            line.close()
    except (OSError, http.client.HTTPException, msgspec.DecodeError, KeyError, TypeError):
        return ""


def _tls(certificate: Path, key: Path) -> Check:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not understood"
        return Check(
            "tls",
            "fail",
            f"{certificate}, {key}: {why}",
            "tls_cert is a certificate chain in PEM form, tls_key its key",
        )
    ends = found.not_valid_after_utc
    seen = f"{certificate}, valid until {ends:%Y-%m-%d}"
    if ends - datetime.now(UTC) < _EXPIRES:
        state: State = "fail" if ends < datetime.now(UTC) else "warn"
        return Check("tls", state, seen, "renew the certificate")
    if key.stat().st_mode & 0o077:
        return Check("tls", "warn", f"{key} can be read by others", f"chmod 600 {key}")
    return Check("tls", "ok", seen)


# --- a member of a cluster ------------------------------------------------------------------------------------------


def _secret(settings: Settings) -> Check:
    if settings.security.jwt_secret is not None:
        return Check(
            "token key", "ok", "derived from JWT_SECRET, which has to be the same on all servers of the cluster"
        )
    advice = "set JWT_SECRET, the same on all servers"
    return Check("token key", "warn", "kept in MongoDB, where all who may read the database may read it", advice)


async def _databases(settings: Settings) -> list[Check]:
    return [check async for check in _all(settings)]


async def _all(settings: Settings) -> AsyncIterator[Check]:
    from mcp_control.storage.mongo.client import connect

    assert settings.mongo.uri is not None
    try:
        async with connect(settings.mongo.uri.get_secret_value(), name="doctor") as client:
            async for check in _mongo(client, settings.mongo.allow_single_member):
                yield check
    except Problem as problem:
        yield Check(
            "mongodb", "fail", problem.detail, "start it, let this machine reach it, and check mongo.uri (MONGODB_URI)"
        )
    if settings.redis.url is None:
        yield Check(
            "redis", "ok", "not set: servers take waiting tasks from MongoDB, and hear of each other a little later"
        )
        return
    async for check in _redis(settings):
        yield check


async def _mongo(client: "Client", single: bool) -> AsyncIterator[Check]:
    from pymongo.errors import PyMongoError

    from mcp_control.storage.mongo.client import findings

    for found in await findings(client, single=single):
        yield Check("mongodb", found.level, found.what, found.advice)
    trips, ahead = [], []
    for _ in range(_ROUND_TRIPS):
        wall, began = time.time(), time.perf_counter()
        told = await client.admin.command("hello")
        trips.append(time.perf_counter() - began)
        ahead.append(told["localTime"].replace(tzinfo=UTC).timestamp() - wall - trips[-1] / 2)
    best = min(range(_ROUND_TRIPS), key=trips.__getitem__)
    yield _pace("mongodb", trips[best] * 1000, 20.0)
    yield _skew(ahead[best] * 1000)
    try:
        answer = await client.admin.command("getParameter", 1, transactionLifetimeLimitSeconds=1)
    except PyMongoError:
        return  # hidden by the provider, or not ours to read; nothing to be done about it from here
    limit = answer["transactionLifetimeLimitSeconds"]
    if limit > _TRANSACTION_SECONDS:
        advice = f"set transactionLifetimeLimitSeconds to {_TRANSACTION_SECONDS} or less"
        yield Check("mongodb", "warn", f"what a dead server held may stay held for {limit} s", advice)


def _pace(name: str, milliseconds: float, most: float) -> Check:
    seen = f"round trip {milliseconds:.1f} ms"
    return (
        Check(name, "ok", seen) if milliseconds <= most else Check(name, "warn", seen, "bring the servers nearer to it")
    )


def _skew(milliseconds: float) -> Check:
    seen = f"{abs(milliseconds) / 1000:.1f} s {'behind' if milliseconds > 0 else 'ahead of'} MongoDB's"
    if abs(milliseconds) <= _SKEW_WARN_MS:
        return Check("clock", "ok", seen)
    return Check(
        "clock", "fail" if abs(milliseconds) > _SKEW_FAIL_MS else "warn", seen, "let NTP set the clocks of all machines"
    )


async def _redis(settings: Settings) -> AsyncIterator[Check]:
    from mcp_control.storage.redis.connection import FAILURES, connect, disconnect

    assert settings.redis.url is not None
    try:
        client = connect(settings.redis.url.get_secret_value(), seconds=_SECONDS)
    except ValueError as error:
        yield Check("redis", "fail", str(error), "correct redis.url (REDIS_URL)")
        return
    try:
        async with asyncio.timeout(_SECONDS):
            found = await _look_at_redis(client, settings.redis.timeout_seconds)
    except TimeoutError:
        found = [_no_redis("no answer in time")]
    except FAILURES as error:
        found = [_no_redis(type(error).__name__)]  # the driver's words may hold the address
    finally:
        await disconnect(client)
    for check in found:
        yield check


def _no_redis(why: str) -> Check:
    advice = "start it and check redis.url (REDIS_URL); meanwhile servers go on without, slower"
    return Check("redis", "fail", f"cannot be used: {why}", advice)


async def _look_at_redis(client: "RedisClient", timeout: float) -> list[Check]:
    from redis.asyncio import RedisCluster

    trips = []
    for _ in range(_ROUND_TRIPS):
        began = time.perf_counter()
        await client.ping()
        trips.append(time.perf_counter() - began)
    found = [_pace("redis", min(trips) * 1000, timeout * 1000 / 5)]
    # One server answers for itself, a cluster for all of its nodes.
    everywhere = {"target_nodes": "all"} if isinstance(client, RedisCluster) else {}
    each = _nodes(await client.info("server", **everywhere), "redis_version")
    memories = _nodes(await client.info("memory", **everywhere), "used_memory")
    versions = sorted({str(one["redis_version"]) for one in each})
    old = [one for one in versions if tuple(map(int, one.split(".")[:2])) < _REDIS]
    seen = f"Redis {', '.join(versions)}" + (f", {len(each)} nodes" if len(each) > 1 else "")
    found.append(Check("redis", "fail", seen, "upgrade to Redis 7 or later") if old else Check("redis", "ok", seen))
    policies = sorted({str(one.get("maxmemory_policy", "unknown")) for one in memories})
    if any(policy.startswith("allkeys") for policy in policies):
        advice = "set maxmemory-policy to noeviction: entries of waiting tasks must not vanish one by one"
        found.append(Check("redis", "fail", f"evicts any key when memory is full ({', '.join(policies)})", advice))
    elif any(not int(one.get("maxmemory", 0)) for one in memories):
        found.append(Check("redis", "ok", f"memory without bound, policy {', '.join(policies)}"))
    else:
        found.append(Check("redis", "ok", f"policy {', '.join(policies)}"))
    return found


def _nodes(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return what each node said."""
    return [told] if name in told else list(told.values())
