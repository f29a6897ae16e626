"""Settings come from four places in one order, are checked as a whole, and tell where each value came from."""

import ast
from pathlib import Path

import pytest

from mcp_control.configuration.settings import Settings, SettingsError, is_loopback, load


@pytest.fixture(autouse=True)
def _no_user_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nobody"))


def test_each_layer_overrides_the_one_below(tmp_path: Path) -> None:
    """Defaults < file < environment < flags, setting by setting."""
    file = tmp_path / "config.toml"
    file.write_text(
        'port = 1001\nhost = "localhost"\nagents = 1\n[leases]\nsweep_seconds = 1\n[queues]\nstore_changes = 20\n'
    )
    environ = {"MCP_CONTROL_PORT": "1002", "MCP_CONTROL_AGENTS": "2", "MCP_CONTROL_QUEUES__STORE_CHANGES": "30"}
    loaded = load({"port": 1003, "data": None}, environ, file)
    settings = loaded.settings
    assert (settings.host, settings.port, settings.agents) == ("localhost", 1003, 2)
    assert (settings.leases.sweep_seconds, settings.queues.store_changes) == (1, 30)
    assert settings.limits.max_body_bytes == 1 << 20
    origins = {source.name: source.origin for source in loaded.sources()}
    assert origins["port"] == "flag"
    assert origins["agents"] == origins["queues.store_changes"] == "environment"
    assert origins["host"] == origins["leases.sweep_seconds"] == "file"
    assert origins["data"] == origins["limits.max_body_bytes"] == "default"


def test_plain_names_are_understood_and_secrets_stay_hidden() -> None:
    """JWT_SECRET and LOG_LEVEL work without the prefix; no view of the settings shows the secret."""
    secret = "canary-" + "0123456789abcdef" * 3
    loaded = load(environ={"JWT_SECRET": secret, "LOG_LEVEL": "WARNING"})
    assert loaded.settings.security.jwt_secret is not None
    assert loaded.settings.security.jwt_secret.get_secret_value() == secret
    assert loaded.settings.log.level == "warning"
    assert secret not in repr(loaded) + str(loaded.sources()) + loaded.model_dump_json()


def test_prefixed_name_wins_over_the_plain_one() -> None:
    """MCP_CONTROL_LOG__LEVEL is more specific than LOG_LEVEL."""
    loaded = load(environ={"LOG_LEVEL": "error", "MCP_CONTROL_LOG__LEVEL": "debug"})
    assert loaded.settings.log.level == "debug"


def test_addresses_of_databases_have_their_usual_names_and_stay_hidden() -> None:
    """MONGODB_URI and REDIS_URL make a cluster node; no view of the settings shows their passwords."""
    environ = {
        "MONGODB_URI": "mongodb://me:canary@a:1,b:2/db?replicaSet=x",
        "REDIS_URL": "rediss://:canary@c:3/0",
        "MCP_CONTROL_REDIS__NAMESPACE": "blue",
    }
    loaded = load(environ=environ)
    mongo, redis = loaded.settings.mongo, loaded.settings.redis
    assert mongo.uri is not None
    assert redis.url is not None
    assert (mongo.uri.get_secret_value(), redis.url.get_secret_value()) == (
        environ["MONGODB_URI"],
        environ["REDIS_URL"],
    )
    assert (mongo.allow_single_member, redis.namespace, redis.timeout_seconds) == (False, "blue", 0.05)
    assert "canary" not in repr(loaded) + str(loaded.sources()) + loaded.model_dump_json()
    origins = {source.name: source.origin for source in loaded.sources()}
    assert origins["mongo.uri"] == origins["redis.url"] == "environment"


def test_redis_without_mongodb_is_refused_with_the_reason() -> None:
    """Who sets REDIS_URL alone expects a cluster, and would not get one."""
    with pytest.raises(SettingsError, match=r"needs no Redis.*mongo\.uri"):
        load(environ={"REDIS_URL": "redis://localhost"})
    settings = load(environ={"REDIS_URL": "", "MONGODB_URI": ""}).settings
    assert (settings.redis.url, settings.mongo.uri) == (None, None)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"mongo.uri": "postgres://me:canary@h"}, "mongo.uri"),
        ({"mongo.uri": "mongodb://h", "redis.url": "http://:canary@h"}, "redis.url"),
    ],
)
def test_an_address_of_another_kind_is_refused_without_its_password(flags: dict[str, object], says: str) -> None:
    """The answer names the setting and what it begins with, not its value."""
    with pytest.raises(SettingsError, match=says) as caught:
        load(flags, {})
    assert "begins with" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": 70_000}, "port"),
        ({"prot": 1}, "prot"),
        ({"limits.max_body_bytes": 1}, "limits.max_body_bytes"),
        ({"security.token_seconds": 60}, "security.token_seconds"),
        ({"host": "0.0.0.0"}, "TLS"),
        ({"host": "::"}, "TLS"),
        ({"host": "example.org"}, "TLS"),
        ({"redis.namespace": "a b"}, "redis.namespace"),
        ({"cluster.advertise": "here"}, "cluster.advertise"),
        ({"tls_cert": "/a.pem"}, "go together"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, object], says: str) -> None:
    """An unknown, wrong or unsafe setting ends the start with its name."""
    with pytest.raises(SettingsError, match=says):
        load(flags, {})


def test_bad_secret_value_is_not_echoed() -> None:
    """What is wrong with a value is said without the value."""
    with pytest.raises(SettingsError) as caught:
        load({"security.jwt_secret": ["canary-value"]}, {})
    assert "canary-value" not in str(caught.value)


def test_listening_beyond_loopback_needs_tls_or_the_operators_word() -> None:
    """TLS or the explicit flag opens other addresses."""
    assert load({"host": "0.0.0.0", "tls_cert": "/c", "tls_key": "/k"}, {}).settings.host == "0.0.0.0"
    assert load({"host": "0.0.0.0", "allow_insecure_bind": True}, {}).settings.host == "0.0.0.0"
    assert [
        is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "10.0.0.1", "a.b")
    ] == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]


def test_file_that_is_named_must_exist_and_parse(tmp_path: Path) -> None:
    """A named file that is missing or broken is an error; the default one may be absent."""
    with pytest.raises(SettingsError, match="no such file"):
        load(environ={"MCP_CONTROL_CONFIG": str(tmp_path / "absent.toml")})
    broken = tmp_path / "broken.toml"
    broken.write_text("port = = 1")
    with pytest.raises(SettingsError, match=r"broken\.toml"):
        load(environ={}, file=broken)


def test_lists_in_the_environment_are_written_with_commas() -> None:
    """Nobody has to write JSON into an environment variable."""
    settings = load(
        environ={"MCP_CONTROL_PLUGINS": "techdeck, other", "MCP_CONTROL_SECURITY__ALLOWED_ORIGINS": "https://a.example"}
    ).settings
    assert settings.plugins == ("techdeck", "other")
    assert settings.security.allowed_origins == ("https://a.example",)
    assert load({"plugins": ["a"]}, {}).settings.plugins == ("a",)


def test_every_setting_explains_itself() -> None:
    """Help, the docs and the checks share one source, so no setting may lack its text."""
    sources = load(environ={}).sources()
    assert len(sources) > 30
    assert [source.name for source in sources if len(source.help) < 10] == []


def test_settings_do_not_change_after_the_start() -> None:
    """Settings are frozen at every level."""
    settings = load(environ={}).settings
    for target, name in ((settings, "port"), (settings.limits, "max_body_bytes")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, name, 1)
    assert isinstance(settings, Settings)


PACKAGE = Path(__file__).parents[2] / "src" / "mcp_control"


def _attributes(path: Path) -> set[str]:
    """The names of attributes that a module reads, but for those of declared settings themselves."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_no_setting_is_without_effect() -> None:
    """Every setting is read by a part of the server that may read settings; one that does nothing would deceive who sets it."""
    readers = [*PACKAGE.glob("*.py"), *(PACKAGE / "api").glob("*.py"), *(PACKAGE / "cli").glob("*.py")]
    read = set().union(*map(_attributes, [*readers, *(PACKAGE / "configuration").glob("*.py")]))
    names = [source.name for source in load(environ={}).sources()]
    assert [name for name in names if not set(name.split(".")) <= read] == []
    assert "no_such_setting" not in read
