"""`mcpctl doctor` finds what would keep a server from running well, and says what to do; its exit code is for scripts."""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mcp_control.testing.databases import MongoSet, RedisCluster, RedisServer, free_ports
from tests.cli.conftest import MCPCTL, Cli, Up

SECRET = "a-secret-of-32-characters-or-more"


class Doctor:
    """Runs the command for a server with given settings."""

    def __init__(self, cli: Cli, folder: Path) -> None:
        self._cli = cli
        self._given = {
            "MCP_CONTROL_DATA": str(folder / "data"),
            "MCP_CONTROL_PORT": str(free_ports(1)[0]),
            "MCP_CONTROL_URL": "http://127.0.0.1:1",
        }

    def __call__(self, code: int = 0, *, alone: bool = False, **environ: str) -> dict[str, list[dict[str, Any]]]:
        """Return the findings by what was looked at.

        `alone` runs it in a process of its own: PyMongo leaves sockets to the collector when it is closed while it connects.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        run = self._cli if alone else self._cli.inside
        for one in json.loads(run("doctor", "--json", code=code, **self._given | environ).stdout):
            found.setdefault(one["check"], []).append(one)
        return found


@pytest.fixture
def doctor(own: Cli, tmp_path: Path) -> Doctor:
    return Doctor(own, tmp_path)


def _states(found: list[dict[str, Any]]) -> list[str]:
    return [one["state"] for one in found]


def test_a_machine_that_is_fine_has_nothing_to_do(doctor: Doctor) -> None:
    """Only the server that is away deserves a look, and that is no failure."""
    found = doctor()
    assert {name for name, each in found.items() if _states(each) != ["ok"]} == {"server reachable"}
    assert "mongodb" not in found
    assert all(one["advice"] for each in found.values() for one in each if one["state"] != "ok")


def test_looking_changes_nothing(doctor: Doctor, tmp_path: Path) -> None:
    """Not even the data folder is made."""
    doctor()
    assert not (tmp_path / "data").exists()


def test_the_table_shows_marks_on_a_terminal(own: Cli, tmp_path: Path) -> None:
    """A check mark, an exclamation mark or a cross stands in front; piped, the words do."""
    given = {"MCP_CONTROL_DATA": str(tmp_path / "d"), "MCP_CONTROL_URL": "http://127.0.0.1:1", "MCP_CONTROL_PORT": "0"}
    main, side = os.openpty()
    with own.background("doctor", **given) as piped:
        assert piped.communicate(timeout=30)[0].splitlines()[1].startswith("ok\tpython")
    with subprocess.Popen(
        [*MCPCTL, "doctor"], stdout=side, stderr=subprocess.DEVNULL, env={**own.environ, **given, "TERM": "dumb"}
    ) as process:
        os.close(side)
        shown = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:
                break
            shown += part
        assert process.wait(30) == 0
    os.close(main)
    lines = shown.decode().splitlines()
    assert any(line.startswith("\N{CHECK MARK}") and "python" in line for line in lines)
    assert any(line.startswith("!") and "server reachable" in line for line in lines)


def test_settings_that_cannot_be_used_are_named(doctor: Doctor) -> None:
    """A Redis without a MongoDB is one of them."""
    (settings,) = doctor(1, REDIS_URL="redis://127.0.0.1:1/0")["settings"]
    assert settings["state"] == "fail"
    assert "mongo.uri" in settings["detail"]


def test_a_data_folder_that_others_can_read_or_nobody_can_make(doctor: Doctor, tmp_path: Path) -> None:
    """The first deserves a look, the second fails."""
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    (folder,) = doctor(MCP_CONTROL_DATA=str(open_to_all))["data folder"]
    assert (folder["state"], folder["advice"]) == ("warn", f"chmod 700 {open_to_all}")
    (tmp_path / "file").touch()
    (folder,) = doctor(1, MCP_CONTROL_DATA=str(tmp_path / "file" / "data"))["data folder"]
    assert folder["state"] == "fail"


def test_a_port_is_free_or_ours_or_taken(doctor: Doctor, started: Callable[..., Up]) -> None:
    """A server of ours tells its version; another program is in the way."""
    running = started()
    given = {"MCP_CONTROL_PORT": running.url.rpartition(":")[2], "MCP_CONTROL_DATA": str(running.data)}
    found = doctor(**given)
    assert found["port"][0]["state"] == "ok"
    assert "a server answers, version 0." in found["port"][0]["detail"]
    assert str(running.process.pid) in found["data folder in use"][0]["detail"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        (port,) = doctor(1, MCP_CONTROL_PORT=str(other.getsockname()[1]))["port"]
    assert port["state"] == "fail"
    assert "--port" in port["advice"]


def _certificate(folder: Path, days: int) -> dict[str, str]:
    """Make a certificate that ends in so many days, with its key, as settings."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=100))
        .not_valid_after(now + timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "key.pem").chmod(0o600)
    return {"MCP_CONTROL_TLS_CERT": str(folder / "cert.pem"), "MCP_CONTROL_TLS_KEY": str(folder / "key.pem")}


@pytest.mark.parametrize(("days", "state"), [(90, "ok"), (5, "warn"), (-1, "fail")])
def test_a_certificate_is_looked_at_before_it_ends(doctor: Doctor, tmp_path: Path, days: int, state: str) -> None:
    """It warns two weeks before."""
    (tls,) = doctor(int(state == "fail"), **_certificate(tmp_path, days))["tls"]
    assert tls["state"] == state


def test_files_that_are_no_certificate_fail(doctor: Doctor, tmp_path: Path) -> None:
    """Missing or unfit ones are named."""
    given = _certificate(tmp_path, 90)
    (tmp_path / "key.pem").write_text("no key")
    (tls,) = doctor(1, **given)["tls"]
    assert str(tmp_path / "key.pem") in tls["detail"]
    (tls,) = doctor(1, **given | {"MCP_CONTROL_TLS_CERT": str(tmp_path / "absent")})["tls"]
    assert "No such file" in tls["detail"]


def test_a_member_of_a_cluster_is_looked_at_with_its_databases(
    doctor: Doctor, mongo_uri: str, redis_server: RedisServer
) -> None:
    """A replica set of three with a Redis is fine, but for the age of the MongoDB that tests use."""
    found = doctor(MONGODB_URI=mongo_uri, REDIS_URL=redis_server.url, JWT_SECRET=SECRET)
    assert _states(found["token key"]) == _states(found["clock"]) == ["ok"]
    assert set(_states(found["redis"])) == {"ok"}
    assert [one["detail"] for one in found["mongodb"] if one["state"] != "ok"] in (
        [],
        [one["detail"] for one in found["mongodb"] if "security fixes" in one["detail"]],
    )
    details = " ".join(one["detail"] for one in (*found["mongodb"], *found["redis"]))
    for part in ("3 members", "no arbiter", "journals", "within seconds", "round trip", "Redis 7"):
        assert part in details
    (key,) = doctor(MONGODB_URI=mongo_uri)["token key"]
    assert key["state"] == "warn"
    assert "JWT_SECRET" in key["advice"]


@pytest.fixture(scope="module")
def lone_mongo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoSet]:
    with MongoSet(tmp_path_factory.mktemp("lone"), single=True) as servers:
        yield servers


def test_too_few_members_fail_unless_it_is_a_trial(doctor: Doctor, lone_mongo: MongoSet) -> None:
    """One member fails, and only warns where the settings allow it."""
    uri = lone_mongo.uri("doctor")
    for code, state, given in ((1, "fail", {}), (0, "warn", {"MCP_CONTROL_MONGO__ALLOW_SINGLE_MEMBER": "true"})):
        members = [one for one in doctor(code, MONGODB_URI=uri, **given)["mongodb"] if "1 member" in one["detail"]]
        assert _states(members) == [state]
        assert members[0]["advice"]


def test_databases_that_are_away_fail_without_their_passwords(doctor: Doctor) -> None:
    """It says which one, what to do, and nothing of the address."""
    mongo, redis = free_ports(2)
    found = doctor(
        1,
        alone=True,
        MONGODB_URI=f"mongodb://me:canary@127.0.0.1:{mongo}/x?replicaSet=y",
        REDIS_URL=f"redis://:canary@127.0.0.1:{redis}/0",
    )
    assert _states(found["mongodb"]) == _states(found["redis"]) == ["fail"]
    assert "MONGODB_URI" in found["mongodb"][0]["advice"]
    assert "slower" in found["redis"][0]["advice"]
    assert "canary" not in json.dumps(found)


def test_a_frozen_redis_does_not_freeze_the_doctor(doctor: Doctor, mongo_uri: str, redis_server: RedisServer) -> None:
    """It gives up after some seconds."""
    redis_server.pause()
    try:
        (redis,) = doctor(1, MONGODB_URI=mongo_uri, REDIS_URL=redis_server.url)["redis"]
    finally:
        redis_server.resume()
    assert "in time" in redis["detail"]


def test_a_redis_that_would_forget_waiting_tasks_fails(
    doctor: Doctor, mongo_uri: str, redis_server: RedisServer
) -> None:
    """A policy that evicts any key does; one that evicts keys with an end does not."""
    for policy, code in (("allkeys-lru", 1), ("volatile-ttl", 0)):
        redis_server.config("maxmemory-policy", policy)
        found = doctor(code, MONGODB_URI=mongo_uri, REDIS_URL=redis_server.url)["redis"]
        assert ("fail" in _states(found)) == bool(code)


def test_a_redis_cluster_is_looked_at_node_by_node(doctor: Doctor, mongo_uri: str, tmp_path: Path) -> None:
    """All its nodes count."""
    with RedisCluster(tmp_path / "cluster") as nodes:
        found = doctor(MONGODB_URI=mongo_uri, REDIS_URL=nodes.url)["redis"]
        assert [one["detail"] for one in found if "3 nodes" in one["detail"]], found
