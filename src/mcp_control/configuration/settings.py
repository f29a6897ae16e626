"""The settings of a server: defaults < TOML file < environment < flags.

The environment is `MCP_CONTROL_*`, and `JWT_SECRET`, `LOG_LEVEL`, `MONGODB_URI` and `REDIS_URL` under their usual names.

A nested setting is written `[limits] max_body_bytes = …` in the file and `MCP_CONTROL_LIMITS__MAX_BODY_BYTES` in the environment.
"""

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as SourceError
from typing_extensions import override

from mcp_control.configuration.groups import (
    Cluster,
    Dispatch,
    Health,
    Leases,
    Limits,
    Log,
    Mongo,
    Names,
    Overload,
    Queues,
    Redis,
    Retention,
    Security,
)

PREFIX: Final = "MCP_CONTROL_"
Origin = Literal["default", "file", "environment", "flag"]

# Plain names that deployments of this kind of server know already.
_PLAIN: Final = {
    "JWT_SECRET": ("security", "jwt_secret"),
    "LOG_LEVEL": ("log", "level"),
    "MONGODB_URI": ("mongo", "uri"),
    "REDIS_URL": ("redis", "url"),
}


class SettingsError(Exception):
    """The settings cannot be used; the message names each setting, where it came from and what is wrong."""


class Settings(BaseSettings):
    """All settings of a server. Frozen: what can change at run time is not a setting."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        nested_model_default_partial_update=True,
    )

    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; other than loopback only with TLS or allow_insecure_bind",
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        default=8640, description="port to listen on; 0 takes a free one"
    )
    data: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("mcp-control"),
        description="data folder; one server at a time uses it",
    )
    tls_cert: Path | None = Field(default=None, description="certificate chain in PEM form")
    tls_key: Path | None = Field(default=None, description="its private key in PEM form")
    allow_insecure_bind: bool = Field(
        default=False, description="listen beyond loopback without TLS, behind a proxy that has it"
    )
    node: str = Field(default="", description="name of this server in status and logs; empty: made from the host name")
    plugins: Names | None = Field(
        default=None, description="names of the plugins to load; unset: all that are installed"
    )
    agents: Annotated[int, Field(ge=0, le=64)] = Field(default=0, description="local agents started with the server")
    limits: Limits = Limits()
    retention: Retention = Retention()
    dispatch: Dispatch = Dispatch()
    leases: Leases = Leases()
    health: Health = Health()
    overload: Overload = Overload()
    queues: Queues = Queues()
    security: Security = Security()
    mongo: Mongo = Mongo()
    redis: Redis = Redis()
    cluster: Cluster = Cluster()
    log: Log = Log()

    @model_validator(mode="after")
    def _safe_bind(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if not (is_loopback(self.host) or self.tls_cert is not None or self.allow_insecure_bind):
            raise ValueError(
                f"listening on {self.host} without TLS would send credentials in the clear: "
                "set tls_cert and tls_key, or allow_insecure_bind behind a proxy that speaks TLS"
            )
        return self

    @model_validator(mode="after")
    def _redis_serves_a_cluster(self) -> Self:
        if self.redis.url is not None and self.mongo.uri is None:
            raise ValueError(
                "redis.url (REDIS_URL) is set and mongo.uri (MONGODB_URI) is not: a single server keeps its data in its folder "
                "and needs no Redis; unset redis.url, or set mongo.uri to run a cluster"
            )
        return self

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what `load` gathered, and nothing behind its back."""
        return (init_settings,)


class Source(BaseModel):
    """One setting as `mcpctl` and the docs show it: its dotted name, its value (secrets hidden), where it came from, its help."""

    model_config = ConfigDict(frozen=True)

    name: str
    value: str
    origin: Origin
    help: str


class Loaded(BaseModel):
    """The settings, and where each came from."""

    model_config = ConfigDict(frozen=True)

    settings: Settings
    origins: dict[str, Origin]

    def sources(self) -> list[Source]:
        """Return every setting in the order of the tree."""
        return [
            Source(name=name, value=_shown(value), origin=self.origins.get(name, "default"), help=text)
            for name, value, text in _leaves(self.settings)
        ]


def load(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> Loaded:
    """Gather the settings.

    Args:
        flags: values by dotted name (`limits.max_body_bytes`); None values count as not given.
        environ: the environment; that of the process by default.
        file: a TOML file that must exist. Without it `MCP_CONTROL_CONFIG` names one, else `config.toml` in the user's configuration
            folder is read where there is one.

    Raises:
        SettingsError: something is unknown, wrong or unsafe.
    """
    env = dict(os.environ if environ is None else environ)
    layers: list[tuple[Origin, dict[str, Any]]] = [
        ("file", _from_file(file, env)),
        ("environment", _from_environment(env)),
        ("flag", _from_flags(flags or {})),
    ]
    merged: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers:
        for path, value in _flat(layer):
            _put(merged, path, value)
            origins[".".join(path)] = origin
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        raise SettingsError(_explain(error, origins)) from None
    return Loaded(settings=settings, origins=origins)


def is_loopback(host: str) -> bool:
    """Say whether an address to listen on is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _from_file(file: Path | None, env: Mapping[str, str]) -> dict[str, Any]:
    named = file or (Path(env[PREFIX + "CONFIG"]) if env.get(PREFIX + "CONFIG") else None)
    path = named or platformdirs.user_config_path("mcp-control") / "config.toml"
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except FileNotFoundError:
        if named is None:
            return {}
        raise SettingsError(f"{path}: there is no such file") from None
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None


class _Environment(EnvSettingsSource):
    """The library's reader of the environment, over a given mapping."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._given = {name.lower(): value for name, value in env.items()}
        super().__init__(Settings)

    @override
    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._given


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, path in _PLAIN.items():
        if env.get(name):
            value = env[name]
            _put(plain, path, value.lower() if name == "LOG_LEVEL" else value)
    try:
        found = _Environment(env)()
    except SourceError as error:
        raise SettingsError(f"environment: {error}") from None
    for where, value in _flat(found):
        _put(plain, where, value)
    return plain


def _from_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            _put(tree, tuple(name.split(".")), value)
    return tree


def _flat(tree: Mapping[str, Any], before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in tree.items():
        path = (*before, name)
        if isinstance(value, Mapping):
            found.extend(_flat(value, path))
        else:
            found.append((path, value))
    return found


def _put(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        step = tree.setdefault(name, {})
        if not isinstance(step, dict):
            raise SettingsError(f"{'.'.join(path)}: {name} is a single value elsewhere")
        tree = step
    tree[path[-1]] = value


def _leaves(model: BaseModel, before: str = "") -> list[tuple[str, object, str]]:
    found: list[tuple[str, object, str]] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found.extend(_leaves(value, f"{before}{name}."))
        else:
            found.append((before + name, value, field.description or ""))
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _explain(error: ValidationError, origins: Mapping[str, Origin]) -> str:
    lines = []
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        name = ".".join(map(str, fault["loc"]))
        origin = origins.get(name)
        where = f"{name} ({origin})" if origin else name
        lines.append(f"{where}: {fault['msg']}" if where else fault["msg"].removeprefix("Value error, "))
    return "; ".join(lines)
