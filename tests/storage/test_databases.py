"""The databases that tests run against do what the tests ask of them, and leave nothing behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pymongo
import pytest
from pymongo.errors import PyMongoError
from redis.exceptions import MovedError, RedisError

from mcp_control.testing.databases import MongoSet, RedisCluster, RedisSentinel, RedisServer, until


def test_acknowledged_writes_outlive_kill_freeze_and_step_down_of_the_primary(
    mongo_set: MongoSet, mongo_uri: str
) -> None:
    """What a majority acknowledged is there under each next primary."""
    with pymongo.MongoClient(mongo_uri, w="majority", timeoutMS=1000, connectTimeoutMS=500) as client:
        table = client.get_default_database()["things"]
        for number, harm in enumerate((mongo_set.kill, mongo_set.pause, lambda _: mongo_set.step_down())):
            before = mongo_set.primary()
            harm(before)
            assert mongo_set.primary() != before
            until(lambda number=number: _kept(table, number), "the next primary takes writes")
            mongo_set.heal()
        assert [each["_id"] for each in table.find().sort("_id")] == [0, 1, 2]


def _kept(table: "pymongo.collection.Collection", number: int) -> bool:
    try:
        table.replace_one({"_id": number}, {}, upsert=True)
    except PyMongoError:
        return False
    return True


def test_a_command_fails_as_often_as_it_is_told_to(mongo_set: MongoSet, mongo_uri: str) -> None:
    """A fail point is counted, and taken back by `heal`."""
    with pymongo.MongoClient(mongo_uri, retryWrites=False) as client:
        table = client.get_default_database()["things"]
        mongo_set.fail_command("insert", errorCode=96)
        with pytest.raises(PyMongoError):
            table.insert_one({})
        table.insert_one({})
        mongo_set.fail_command("insert", times=None, errorCode=96)
        mongo_set.heal()
        table.insert_one({})


def test_each_test_has_a_database_of_its_own(mongo_uri: str) -> None:
    """It is empty."""
    with pymongo.MongoClient(mongo_uri) as client:
        assert client.get_default_database().list_collection_names() == []


def test_a_restarted_redis_is_empty_and_a_frozen_one_silent(redis_server: RedisServer) -> None:
    """Restart forgets, pause answers nothing, resume goes on."""
    redis_server.command("SET", "a", "1")
    redis_server.pause()
    redis_server.resume()
    assert redis_server.command("GET", "a") == b"1"
    redis_server.restart()
    assert redis_server.command("GET", "a") is None
    redis_server.kill()
    with pytest.raises(RedisError):
        redis_server.command("PING")


def test_sentinels_make_the_replica_master(tmp_path: Path) -> None:
    """After the loss of the master the other one is."""
    with RedisSentinel(tmp_path) as servers:
        first = servers.master()
        first.kill()
        until(lambda: servers.master() is not first, "a new master")


def test_a_cluster_shares_out_its_slots(tmp_path: Path) -> None:
    """A key lives on one node; the others say where."""
    with RedisCluster(tmp_path) as nodes:
        taken = 0
        for server in nodes.servers:
            with suppress(MovedError):
                taken += server.command("SET", "a", "1")
        assert taken == 1


@pytest.mark.parametrize("made", ["databases.RedisServer", "server.ServerProcess"])
def test_servers_end_with_the_process_that_started_them(made: str, tmp_path: Path) -> None:
    """kill -9 of the tests leaves no server behind, not even a frozen one."""
    module, _, name = made.partition(".")
    code = (
        f"import sys; from pathlib import Path; from mcp_control.testing.{module} import {name};"
        f"server = {name}(Path(sys.argv[1])).start(); print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert child.is_running()
        child.suspend()
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the server is gone", 5)
