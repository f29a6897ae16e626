"""Real databases for tests: what starts, harms and stops them, and the fixtures that share them.

All of them can be killed, frozen and started again on the same port and data, and none outlives the process that started it.
`tests/conftest.py` hands the fixtures to all test folders; each process of a test run has servers of its own.
"""

import secrets
from collections.abc import Iterator

import pytest

from mcp_control.testing.mongo_servers import MongoSet
from mcp_control.testing.programs import Program, free_ports, until
from mcp_control.testing.redis_servers import RedisCluster, RedisSentinel, RedisServer

__all__ = [
    "MongoSet",
    "Program",
    "RedisCluster",
    "RedisSentinel",
    "RedisServer",
    "free_ports",
    "mongo_set",
    "mongo_uri",
    "redis_server",
    "redis_url",
    "shared_redis",
    "until",
]


@pytest.fixture(scope="session")
def mongo_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoSet]:
    """A replica set of three, shared by the tests of one process."""
    with MongoSet(tmp_path_factory.mktemp("mongo")) as servers:
        yield servers


@pytest.fixture
def mongo_uri(mongo_set: MongoSet) -> Iterator[str]:
    """The URI of a database of this test's own on a healthy replica set."""
    database = f"test_{secrets.token_hex(6)}"
    mongo_set.heal()
    yield mongo_set.uri(database)
    mongo_set.heal()
    mongo_set.drop(database)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """An empty Redis server, started anew for this test."""
    shared_redis.heal()
    return shared_redis


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis server."""
    return redis_server.url
