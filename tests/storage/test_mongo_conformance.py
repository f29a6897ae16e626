"""The store on MongoDB keeps every promise of the port."""

import pytest

from mcp_control.kernel.errors import Problem
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.store_conformance import *  # noqa: F403  the tests of the port
from mcp_control.testing.store_conformance import StoreFactory


def _fatal(problem: Problem) -> None:
    raise AssertionError(problem)


@pytest.fixture
def store_factory(mongo_uri: str) -> StoreFactory:
    def make() -> MongoStore:
        store = MongoStore(mongo_uri, node="n1", fatal=_fatal)
        store.lead = True
        return store

    return make
