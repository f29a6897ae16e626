"""The same tests on a single server's folder and on the databases of a cluster.

A test that starts servers asks for the fixture `backend`, itself or through another fixture, and runs on both. The marker `embedded` keeps
it to the folder, for what only a single server has; `long_on_cluster` makes its run on the databases one of the long tests.
"""

from collections.abc import Iterator

import pytest

from mcp_control.testing.databases import MongoSet, RedisServer
from mcp_control.testing.server import PREFIX, on_databases

__all__ = ["backend", "pytest_generate_tests"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that asks for it its back ends."""
    if "backend" not in metafunc.fixturenames:
        return
    there: list[object] = ["embedded"]
    if metafunc.definition.get_closest_marker("embedded") is None:
        long = metafunc.definition.get_closest_marker("long_on_cluster") is not None
        there.append(pytest.param("cluster", marks=[pytest.mark.long] if long else []))
    metafunc.parametrize("backend", there, indirect=True, scope="module")


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What servers of the test keep their data in: `embedded`, a folder, or `cluster`, MongoDB and Redis."""
    name: str = request.param
    if name == "embedded":
        yield name
        return
    mongo: MongoSet = request.getfixturevalue("mongo_set")
    redis: RedisServer = request.getfixturevalue("shared_redis")
    mongo.heal()
    redis.heal()
    with on_databases(mongo.uri("DATABASE"), redis.url):
        yield name
    mongo.heal()
    mongo.drop_all(PREFIX)
