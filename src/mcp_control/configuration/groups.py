"""The groups of settings: names, bounds, defaults, and the help that the command line and the docs show."""

from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic_settings import NoDecode

_MONGO_SCHEMES: Final = ("mongodb://", "mongodb+srv://")
_REDIS_SCHEMES: Final = (
    "redis://",
    "rediss://",
    "redis+sentinel://",
    "rediss+sentinel://",
    "redis+cluster://",
    "rediss+cluster://",
)

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Days = Annotated[float, Field(gt=0, le=36_500)]
Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=1024)]


def _split(value: object) -> object:
    """A list in the environment is written with commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Limits(_Group):
    """What one request or thing may take."""

    max_body_bytes: Bytes = Field(default=1 << 20, description="largest request body, except for artifact uploads")
    max_header_bytes: Bytes = Field(default=16 * 1024, description="largest request header block")
    body_timeout_seconds: Seconds = Field(default=30.0, description="how long a request body may stall")
    header_timeout_seconds: Seconds = Field(default=10.0, description="how long a request header may take")
    max_artifact_bytes: Bytes = Field(default=10 << 30, description="largest artifact")
    max_frame_bytes: Bytes = Field(default=1 << 20, description="largest WebSocket frame")
    max_log_lines: Count = Field(
        default=100_000, description="lines kept of what a task logs; further ones are counted"
    )
    max_log_bytes: Bytes = Field(
        default=64 << 20, description="bytes kept of what a task logs; further lines are counted"
    )


class Retention(_Group):
    """How long things are kept after they ended."""

    events_days: Days = Field(default=7.0, description="events older than this are removed")
    events_count: Count = Field(default=1_000_000, description="events beyond this many are removed, oldest first")
    tasks_days: Days = Field(default=30.0, description="finished tasks older than this are removed")
    payload_days: Days | None = Field(
        default=None,
        description="payloads and results of tasks that finished longer ago are emptied; unset: kept with them",
    )
    runs_days: Days = Field(default=30.0, description="finished runs older than this are removed, with their artifacts")
    interval_seconds: Seconds = Field(default=60.0, description="how often ended things are looked for")


class Leases(_Group):
    """Ends the leases of silent agents. How long an agent may be silent is its own: 2 s to 1 h, 30 s unless it says so."""

    sweep_seconds: Seconds = Field(default=0.5, description="how often ended leases are looked for")
    drift_seconds: Seconds = Field(
        default=60.0, description="how often what agents are counted to hold is compared with the leases in the store"
    )


class Health(_Group):
    """Agents are judged by what they get done: slow, silent, stuck or flapping."""

    fence: bool = Field(default=True, description="take tasks that stand still from their agents; off: only shown")
    quarantine: bool = Field(
        default=True, description="keep agents that are stuck, silent on work or flapping from work for a time"
    )
    interval_seconds: Seconds = Field(default=5.0, description="how often agents are judged")
    least_history: Count = Field(default=50, description="completed attempts of a type before its times say anything")
    slow_factor: Annotated[float, Field(ge=1)] = Field(
        default=3.0, description="times the 99th percentile of its type after which a task makes its agent slow"
    )
    stuck_factor: Annotated[float, Field(ge=1)] = Field(
        default=20.0, description="times the 99th percentile without a sign of life after which a task stands still"
    )
    stuck_seconds: Seconds = Field(default=300.0, description="seconds before which nothing is said to stand still")
    silent_seconds: Seconds = Field(
        default=60.0, description="how long work may wait for an agent that asks for none, or be left alone by it"
    )
    flapping_losses: Count = Field(default=8, description="leases lost within the window that are too many")
    flapping_connects: Count = Field(default=60, description="connections within the window that are too many")
    window_seconds: Seconds = Field(default=600.0, description="the window")
    probe_seconds: Seconds = Field(
        default=60.0, description="first time in quarantine; then one task shows whether the agent is well"
    )
    probe_longest_seconds: Seconds = Field(
        default=3600.0, description="longest time in quarantine; it doubles with each that fails"
    )


class Dispatch(_Group):
    """Which agent gets a task."""

    strategy: Literal["least_loaded", "fastest", "round_robin"] = Field(
        default="least_loaded", description="how to choose among agents that fit, where a task does not say"
    )


class Overload(_Group):
    """When new work is shed to keep accepted work moving; submits go first, completions and heartbeats last."""

    max_queued_tasks: Count = Field(default=2_000_000, description="waiting tasks beyond which submits are refused")
    max_requests: Count = Field(default=1000, description="submits handled at once")
    max_connections: Count = Field(default=5000, description="open WebSocket and event-stream connections")
    loop_lag_seconds: Seconds = Field(default=0.5, description="event-loop lag beyond which submits are refused")
    retry_after_seconds: Seconds = Field(default=1.0, description="what a refused caller is told to wait")


class Queues(_Group):
    """Sizes of the queues inside the server."""

    store_changes: Count = Field(default=20_000, description="changes that may wait for a commit")
    subscriber_events: Count = Field(
        default=1000, description="events that may wait for one subscriber before it must read anew"
    )
    priority_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        default=6.0,
        description="waiting time that counts as much as one point of priority; bounds what can overtake a task",
    )
    agent_bytes: Bytes = Field(
        default=8 << 20, description="bytes that may wait for one agent before its connection is closed"
    )


class Security(_Group):
    """Logins and tokens."""

    jwt_secret: SecretStr | None = Field(
        default=None,
        description="secret the token key is derived from; without it a key is made, in the data folder or the shared store",
    )
    token_seconds: Annotated[int, Field(ge=300, le=900)] = Field(default=600, description="life of an access token")
    leeway_seconds: Annotated[int, Field(ge=0, le=30)] = Field(
        default=10, description="clock difference accepted in access tokens"
    )
    password_memory_kib: Annotated[int, Field(ge=19_456)] = Field(
        default=46 * 1024, description="argon2id memory per hash"
    )
    allowed_origins: Names = Field(default=(), description="browser origins that may open /ws; none by default")
    allowed_hosts: Names = Field(default=(), description="Host names answered, without port; any by default")


def _with_scheme(schemes: tuple[str, ...]) -> AfterValidator:
    """The address of a database begins with one of these; it may hold a password, so the answer does not repeat it."""

    def check(address: SecretStr | None) -> SecretStr | None:
        if address is None or not address.get_secret_value():
            return None
        if not address.get_secret_value().startswith(schemes):
            raise ValueError(f"begins with none of {', '.join(schemes)}")
        return address

    return AfterValidator(check)


class Mongo(_Group):
    """The store that the servers of a cluster share."""

    uri: Annotated[SecretStr | None, _with_scheme(_MONGO_SCHEMES)] = Field(
        default=None,
        description="MongoDB replica set that holds the data (also MONGODB_URI); unset: one server, data in its folder",
    )
    allow_single_member: bool = Field(
        default=False, description="accept a replica set of fewer than three members, for trials: losing one loses data"
    )


class Redis(_Group):
    """What makes a cluster quick: wake-ups, the order of waiting tasks, shared counters. Nothing is lost with it."""

    url: Annotated[SecretStr | None, _with_scheme(_REDIS_SCHEMES)] = Field(
        default=None, description="Redis server, Sentinels or cluster (also REDIS_URL); unset: slower, but complete"
    )
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(
        default="mcp", description="first part of all keys; each product that shares a Redis has its own"
    )
    timeout_seconds: Annotated[float, Field(ge=0.005, le=5)] = Field(
        default=0.05, description="how long one Redis call may take before the server goes on without"
    )


class Cluster(_Group):
    """Servers that share one store."""

    leader_seconds: Annotated[float, Field(ge=0.5, le=300)] = Field(
        default=5.0,
        description="how long leadership and a server's place in the cluster last without renewal; renewed four times as often",
    )
    advertise: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = Field(
        default="", description="URL under which this server is reached, shown in status; empty: none is shown"
    )


class Log(_Group):
    """What is logged and how."""

    level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        default="info", description="least severe level logged"
    )
    format: Literal["auto", "json", "console"] = Field(
        default="auto", description="auto: console on a terminal, else JSON lines"
    )
