"""The connection to the replica set: options that keep the promises, checks at start, and errors in the product's words.

Majority writes and majority reads on the primary are what makes an acknowledged change survive a failover (promise G1); an address that
asks for less is refused rather than obeyed. A server that answers with a fencing token has it acknowledged by a majority first (G3).
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

import msgspec
from bson.codec_options import CodecOptions
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.read_concern import ReadConcern
from pymongo.read_preferences import ReadPreference
from pymongo.server_type import SERVER_TYPE
from pymongo.write_concern import WriteConcern

from mcp_control.kernel.errors import Problem, StorageFull, StoreUnavailable

Document = dict[str, Any]
Client = AsyncMongoClient[Document]
Database = AsyncDatabase[Document]
Level = Literal["ok", "warn", "fail"]

BUDGET: Final = 4.5  # seconds for one call, so that the caller hears within 5
SNAPSHOT: Final = ReadConcern("snapshot")
MAJORITY: Final = WriteConcern("majority")
_LOOK_SECONDS: Final = 0.1
_DATABASE: Final = "mcp_control"
_OLDEST: Final = (6, 0)
_SUPPORTED: Final = (7, 0)
_UNAUTHORIZED: Final = 13
_NO_REPLICATION: Final = 76
_DISK_FULL: Final = 14031
# Options of an address and the values that would not weaken what the store promises.
_DEMANDED: Final = {
    "w": ("majority",),
    "readconcernlevel": ("majority",),
    "readpreference": ("primary",),
    "retrywrites": ("true",),
    "retryreads": ("true",),
    "journal": ("true",),
    "directconnection": ("false",),
    "loadbalanced": ("false",),
}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at: how it stands, what was seen, and what to do about it (empty when nothing)."""

    level: Level
    what: str
    advice: str = ""


class NewPrimaryError(AutoReconnect):
    """The primary that was asked is none any more; whether it did what it was asked is not known."""


class Primary:
    """Which member is primary, as the driver knows it at the moment it is asked."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._elections = 0
        self._last: object = None
        self._asking: set[asyncio.Timeout] = set()

    @property
    def address(self) -> str | None:
        """Host and port; None while there is no primary."""
        return self._look()[0]

    @property
    def elections(self) -> int:
        """Grows when another member, or the same in a new term, is primary than when this was last asked."""
        now = self._look()
        if now[0] is not None and now != self._last:
            self._elections += self._last is not None
            self._last = now
        return self._elections

    @asynccontextmanager
    async def lasting(self) -> AsyncIterator[None]:
        """Give up what is asked in this block, with NewPrimaryError, when there is a new primary: a frozen one would never answer."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._asking.add(limit)
                try:
                    yield
                finally:
                    self._asking.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise NewPrimaryError("another member has become primary") from None

    async def watch(self) -> None:
        """Look for new primaries until cancelled."""
        loop = asyncio.get_running_loop()
        before = self._look()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = self._look()
            if now[0] is None or now == before:
                continue
            before = now
            asking, self._asking = self._asking, set()
            for limit in asking:
                limit.reschedule(loop.time())

    def _look(self) -> tuple[str | None, object]:
        for server in self._client.topology_description.server_descriptions().values():
            if server.server_type == SERVER_TYPE.RSPrimary:
                return f"{server.address[0]}:{server.address[1]}", server.election_id
        return None, None


def connect(uri: str, *, name: str) -> Client:
    """Return a client with the options this product needs; nothing is sent yet.

    Raises:
        StoreUnavailable: the address cannot be understood, or asks for less than is needed; its text is never repeated.
    """
    _refuse_weaker(uri)
    try:
        return AsyncMongoClient(
            uri,
            appname=f"mcp-control {name}"[:100],
            w="majority",
            journal=True,
            readConcernLevel="majority",
            readPreference="primary",
            retryWrites=True,
            retryReads=True,
            timeoutMS=round(BUDGET * 1000),
            connectTimeoutMS=1000,
            heartbeatFrequencyMS=1000,  # a frozen primary, or one that took back its word, is noticed within about two seconds
            serverSelectionTimeoutMS=round(BUDGET * 1000),
        )
    except (InvalidURI, ConfigurationError, ValueError, PyMongoError):
        # The driver's words may hold parts of the address, and with them of a password.
        raise StoreUnavailable(
            "MONGODB_URI cannot be understood; it is mongodb://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE?replicaSet=NAME, "
            "with special characters of user and password percent-encoded"
        ) from None


def database_of(client: Client) -> Database:
    """Return the database that the address names, else `mcp_control`."""
    return client.get_default_database(
        _DATABASE,
        codec_options=CodecOptions(),
        read_preference=ReadPreference.PRIMARY,
        write_concern=MAJORITY,
        read_concern=ReadConcern("majority"),
    )


def _refuse_weaker(uri: str) -> None:
    try:
        options = parse_qsl(urlsplit(uri).query, keep_blank_values=True)
    except ValueError:
        return  # the driver refuses it, too
    for name, value in options:
        allowed = _DEMANDED.get(name.lower())
        if allowed is not None and value.lower() not in allowed:
            raise StoreUnavailable(
                f"MONGODB_URI sets {name} so that acknowledged changes could be lost or hidden; leave it out, or set it to {allowed[0]}"
            )


async def findings(client: Client, *, single: bool = False) -> list[Finding]:
    """Look at the deployment behind a client.

    Args:
        client: from `connect`.
        single: whether fewer than three members are accepted, for trials.

    Raises:
        StoreUnavailable: nobody answers, or the credentials are not accepted.
    """
    try:
        hello = await client.admin.command("hello")
        build = await client.admin.command("buildInfo")
        found = [_version(build)]
        if "setName" not in hello:
            return [
                *found,
                Finding(
                    "fail", "it is not a replica set", "start mongod with --replSet and initiate a set of three members"
                ),
            ]
        try:
            answer = await client.admin.command("replSetGetConfig")
        except OperationFailure as error:
            if error.code != _UNAUTHORIZED:
                raise
            return [*found, *_from_hello(hello, single)]
        return [*found, *_from_config(answer["config"], single)]
    except PyMongoError as error:
        raise unavailable(error) from None


def _version(build: Document) -> Finding:
    version = str(build.get("version", "0"))
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if number < _OLDEST:
        return Finding("fail", f"MongoDB {version} is too old", "upgrade to MongoDB 8.0")
    if number < _SUPPORTED:
        return Finding("warn", f"MongoDB {version} gets no security fixes any more", "upgrade to MongoDB 8.0")
    return Finding("ok", f"MongoDB {version}")


def _from_hello(hello: Document, single: bool) -> list[Finding]:
    found = [
        _members(len(hello.get("hosts", [])) + len(hello.get("passives", [])), single),
        _arbiters(len(hello.get("arbiters", []))),
    ]
    advice = "grant the role clusterMonitor, or check settings and writeConcernMajorityJournalDefault with rs.conf()"
    return [*found, Finding("warn", "the configuration of the replica set cannot be read", advice)]


def _from_config(config: Document, single: bool) -> list[Finding]:
    members = config.get("members", [])
    data = [member for member in members if not member.get("arbiterOnly")]
    found = [_members(len(data), single), _arbiters(len(members) - len(data))]
    if config.get("writeConcernMajorityJournalDefault", True):
        found.append(Finding("ok", "a majority acknowledges from its journals"))
    else:
        advice = "set writeConcernMajorityJournalDefault to true with rs.reconfig()"
        found.append(
            Finding(
                "fail", "a majority acknowledges from memory, so that power loss loses acknowledged changes", advice
            )
        )
    settings = config.get("settings", {})
    slow = [
        f"{name} is {value}"
        for name, value, most in (
            ("electionTimeoutMillis", settings.get("electionTimeoutMillis", 10_000), 5_000),
            ("heartbeatTimeoutSecs", settings.get("heartbeatTimeoutSecs", 10), 5),
            ("catchUpTimeoutMillis", settings.get("catchUpTimeoutMillis", -1), 5_000),
        )
        if not 0 <= value <= most
    ]
    if slow:
        advice = "set settings.electionTimeoutMillis=2000, heartbeatTimeoutSecs=2 and catchUpTimeoutMillis=2000 with rs.reconfig()"
        found.append(Finding("warn", f"a failed primary is replaced slowly: {', '.join(slow)}", advice))
    else:
        found.append(Finding("ok", "a failed primary is replaced within seconds"))
    return found


def _members(count: int, single: bool) -> Finding:
    if count >= 3:
        return Finding("ok", f"the replica set has {count} members with data")
    advice = "add members until three hold data; for a trial set mongo.allow_single_member"
    return Finding(
        "warn" if single else "fail",
        f"the replica set has {count} member(s) with data, so that one failure stops it or loses data",
        advice,
    )


def _arbiters(count: int) -> Finding:
    if count == 0:
        return Finding("ok", "the replica set has no arbiter")
    advice = "replace the arbiter by a member with data"
    return Finding(
        "fail", "the replica set has an arbiter, with which a majority may acknowledge what one disk holds", advice
    )


def unavailable(error: PyMongoError) -> Problem:
    """Return the problem for an error of the driver after which nothing was applied. Addresses and credentials stay out of it."""
    if isinstance(error, OperationFailure):
        if error.code == _DISK_FULL:
            return StorageFull(
                "the disk of MongoDB is full; reads work, writes do not until there is space", retry_after=5
            )
        if error.code in (_UNAUTHORIZED, 18):
            return StoreUnavailable("MongoDB refused the credentials or the right to do this", retry_after=5)
        if error.code == _NO_REPLICATION:
            return StoreUnavailable(
                "MongoDB runs without a replica set; start mongod with --replSet and initiate a set of three members"
            )
        name = (error.details or {}).get("codeName") or f"code {error.code}"
        if isinstance(error, ExecutionTimeout):
            return StoreUnavailable("MongoDB did not answer in time", retry_after=1)
        return StoreUnavailable(f"MongoDB refused the operation ({name})", retry_after=1)
    if isinstance(error, ServerSelectionTimeoutError):
        return StoreUnavailable("no primary of the MongoDB replica set could be reached", retry_after=1)
    if isinstance(error, ConnectionFailure):
        return StoreUnavailable("the connection to MongoDB was lost", retry_after=1)
    return StoreUnavailable(f"MongoDB cannot be used ({type(error).__name__})", retry_after=1)
