"""Redis for tests, on free ports of loopback: one server, one with Sentinels, a cluster.

Every method blocks: where an event loop must go on meanwhile, call it through `asyncio.to_thread`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from mcp_control.testing.programs import ANSWER_SECONDS, HOST, START_SECONDS, Program, free_ports, until


def _client(port: int, seconds: float) -> redis.Redis:
    return redis.Redis(host=HOST, port=port, socket_timeout=seconds, retry=Retry(NoBackoff(), 0))


class RedisServer:
    """A Redis server that keeps nothing over a restart; not started until `start`. `DEBUG` is open.

    Args:
        folder: where its log goes.
        settings: of redis.conf, with `_` for `-`: `maxmemory="1mb"`.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        [self.port] = free_ports(1)
        given = {
            "bind": HOST,
            "save": "",
            "appendonly": "no",
            "enable-debug-command": "local",
            "dir": folder,
            **settings,
        }
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        self._program = Program(["redis-server", "--port", str(self.port), *words], self.port, folder / "redis.log")

    @property
    def url(self) -> str:
        """Its URL, database 0."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._program.pid

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._program.alive

    def start(self) -> Self:
        """Start it and return when it answers; one that runs is left alone."""
        self._program.start()
        return self

    def kill(self) -> None:
        """kill -9: all it knew is gone."""
        self._program.kill()

    def restart(self) -> None:
        """Kill it and start it again, empty."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): its connections stay open and nothing is answered."""
        self._program.pause()

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._program.resume()

    def command(self, *words: object) -> Any:
        """Run a command and return its answer (`command("CLIENT", "PAUSE", 10_000, "ALL")`)."""
        with _client(self.port, START_SECONDS) as client:
            return client.execute_command(*words)

    def config(self, name: str, value: object) -> None:
        """Change a setting of the running server (`CONFIG SET`)."""
        self.command("CONFIG", "SET", name, str(value))

    def heal(self) -> None:
        """Undo all that was done to it: it runs, answers and is empty, with the settings it was made with."""
        self.restart()

    def stop(self) -> None:
        """Kill it for good."""
        self._program.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisSentinel:
    """One Redis server, a replica of it, and three Sentinels that make the replica master about a second after the loss of the other."""

    service: Final = "tests"

    def __init__(self, folder: Path) -> None:
        self.servers = [RedisServer(folder / "a"), RedisServer(folder / "b")]
        self.servers[1] = RedisServer(folder / "b", replicaof=f"{HOST} {self.servers[0].port}")
        self._sentinels = [self._sentinel(folder / f"sentinel{port}", port) for port in free_ports(3)]

    def _sentinel(self, folder: Path, port: int) -> Program:
        folder.mkdir(parents=True, exist_ok=True)
        configuration = folder / "sentinel.conf"
        configuration.write_text(
            f"port {port}\nbind {HOST}\ndir {folder}\n"
            f"sentinel monitor {self.service} {HOST} {self.servers[0].port} 2\n"
            f"sentinel down-after-milliseconds {self.service} 500\n"
            f"sentinel failover-timeout {self.service} 2000\n"
        )
        return Program(["redis-server", str(configuration), "--sentinel"], port, folder / "sentinel.log")

    @property
    def url(self) -> str:
        """The URL that names the Sentinels and the service."""
        hosts = ",".join(f"{HOST}:{each.port}" for each in self._sentinels)
        return f"redis+sentinel://{hosts}/{self.service}/0"

    def master(self) -> RedisServer:
        """Return the server that most Sentinels call master."""
        ports = [self._told(each.port) for each in self._sentinels]
        return next(each for each in self.servers if ports.count(each.port) >= 2)

    def _told(self, port: int) -> int:
        with _client(port, ANSWER_SECONDS) as client:
            return int(client.sentinel_get_master_addr_by_name(self.service)[1])

    def _ready(self) -> bool:
        with suppress(RedisError):
            return all(self._complete(each.port) for each in self._sentinels)
        return False

    def _complete(self, port: int) -> bool:
        with _client(port, ANSWER_SECONDS) as client:
            told = client.sentinel_master(self.service)
            assert isinstance(told, dict)
            return (told["num-slaves"], told["num-other-sentinels"]) == (1, 2)

    def start(self) -> Self:
        """Start all of it and return when the Sentinels know each other and the replica."""
        for server in self.servers:
            server.start()
        for each in self._sentinels:
            each.start()
        until(self._ready, "the Sentinels know each other")
        return self

    def stop(self) -> None:
        """Kill all of it."""
        for each in self._sentinels:
            each.close()
        for server in self.servers:
            server.stop()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()


class RedisCluster:
    """A Redis cluster of three masters without replicas."""

    def __init__(self, folder: Path) -> None:
        self._buses = free_ports(3)
        self.servers = [
            RedisServer(folder / str(bus), cluster_enabled="yes", cluster_port=bus, cluster_node_timeout=1000)
            for bus in self._buses
        ]

    @property
    def url(self) -> str:
        """The URL that names its nodes."""
        return "redis+cluster://" + ",".join(f"{HOST}:{each.port}" for each in self.servers)

    def start(self) -> Self:
        """Start it, share out the slots, and return when all nodes say that it works."""
        bounds = (0, 5461, 10_923, 16_384)
        for index, server in enumerate(self.servers):
            server.start()
            server.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            server.command("CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
        for server, bus in zip(self.servers[1:], self._buses[1:], strict=True):
            self.servers[0].command("CLUSTER", "MEET", HOST, server.port, bus)
        until(lambda: all(map(self._works, self.servers)), "the cluster works")
        return self

    def _works(self, server: RedisServer) -> bool:
        told = server.command("CLUSTER", "INFO").decode().splitlines()
        return "cluster_state:ok" in told and f"cluster_known_nodes:{len(self.servers)}" in told

    def stop(self) -> None:
        """Kill all of it."""
        for server in self.servers:
            server.stop()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
