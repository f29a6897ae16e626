"""From a URL to a client of redis-py: one server, Sentinel or a cluster.

    redis://[user:password@]host[:6379][/database]              one server; `rediss://` with TLS
    redis+sentinel://[user:password@]host[:26379],…/service[/database]  the master that the Sentinels name; `rediss+sentinel://`
    redis+cluster://[user:password@]host[:6379],…               a cluster; `rediss+cluster://`

The credentials are those of the Redis servers. The query may hold `sentinel_username`, `sentinel_password`, and for TLS `ssl_ca_certs`,
`ssl_certfile`, `ssl_keyfile` (paths).
"""

from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.maint_notifications import MaintNotificationsConfig

RedisClient = Redis | RedisCluster
FAILURES: Final = (RedisError, RedisClusterException, OSError)
"""All that a client raises for trouble with Redis; OSError holds TimeoutError."""

_SCHEMES: Final = {
    f"{scheme}{kind}": (kind, scheme == "rediss")
    for scheme in ("redis", "rediss")
    for kind in ("", "+sentinel", "+cluster")
}
_SENTINEL_OPTIONS: Final = {"sentinel_username": "username", "sentinel_password": "password"}
_TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
_SECONDS: Final = 1.0
_CONNECTIONS: Final = 256


def connect(url: str, *, seconds: float = _SECONDS) -> RedisClient:
    """Return a client; nothing is sent before its first command.

    It never repeats a command by itself: who calls it decides, and trouble must show at once.

    Args:
        url: see above.
        seconds: the most that connecting may take, and asking Sentinels. `RedisLink` bounds all that is done with the client.

    Raises:
        ValueError: the URL cannot be used. The message holds nothing of it, since it may hold a password.
    """
    try:
        parts = urlsplit(url)
        kind, tls = _SCHEMES[parts.scheme]
        hosts = [_host(each, 26379 if kind == "+sentinel" else 6379) for each in _place(parts).split(",")]
        options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        path = [unquote(part) for part in parts.path.split("/") if part]
    except (ValueError, KeyError):
        raise ValueError(
            "a Redis URL looks like redis://host:6379/0, redis+sentinel://host:26379,host:26379/service/0 or "
            "redis+cluster://host:6379,host:6379; reserved characters in a password are percent-encoded"
        ) from None
    if unknown := sorted(options.keys() - _TLS_OPTIONS - _SENTINEL_OPTIONS.keys()):
        raise ValueError(f"the Redis URL has options that are not known: {', '.join(unknown)}")
    common: dict[str, Any] = {
        **_credentials(parts),
        # No limit on single reads and writes: redis-py would use `asyncio.wait_for`, which in Python 3.11 loses cancellations.
        "socket_timeout": None,
        "socket_connect_timeout": seconds,
        "protocol": 2,  # the scripts answer in bytes; and nothing has to be agreed on when connecting
        "driver_info": None,
    }
    if tls:
        common |= {"ssl": True} | {name: value for name, value in options.items() if name in _TLS_OPTIONS}
    if kind == "+cluster":
        nodes = [ClusterNode(host, port) for host, port in hosts]
        return RedisCluster(
            startup_nodes=nodes,
            retry=_no_retry(),
            max_connections=_CONNECTIONS,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            **common,
        )
    common |= {"retry": _no_retry(), "max_connections": _CONNECTIONS}
    if kind == "+sentinel":
        return _by_sentinel(hosts, path, common, options)
    if len(hosts) > 1:
        raise ValueError("several hosts in a Redis URL need the scheme redis+sentinel or redis+cluster")
    return Redis(host=hosts[0][0], port=hosts[0][1], db=_database(path), **common)


async def disconnect(client: RedisClient) -> None:
    """Close a client and all that `connect` made with it. Calling it twice is a no-op."""
    await client.aclose()
    if isinstance(client, Redis) and isinstance(client.connection_pool, SentinelConnectionPool):
        for each in client.connection_pool.sentinel_manager.sentinels:
            await each.aclose()


def _by_sentinel(
    hosts: list[tuple[str, int]], path: list[str], common: dict[str, Any], options: dict[str, str]
) -> Redis:
    if not path:
        raise ValueError("the Redis URL names no service: redis+sentinel://host:26379/service")
    own = {name: value for name, value in common.items() if name not in ("username", "password")}
    # A Sentinel that hangs must leave time for the others.
    own |= {
        "socket_timeout": common["socket_connect_timeout"] / 4,
        "socket_connect_timeout": common["socket_connect_timeout"] / 4,
    }
    own |= {name: options[option] for option, name in _SENTINEL_OPTIONS.items() if option in options}
    manager = Sentinel(hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    client: Redis = manager.master_for(path[0], db=_database(path[1:]), **common)
    return client


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def _place(parts: SplitResult) -> str:
    place = parts.netloc.rpartition("@")[2]
    if not place:
        raise ValueError("no host")
    return place


def _host(text: str, default_port: int) -> tuple[str, int]:
    """Return host and port; an IPv6 address stands in brackets."""
    one = urlsplit(f"//{text}")
    if not one.hostname:
        raise ValueError("no host")
    return one.hostname, one.port or default_port


def _credentials(parts: SplitResult) -> dict[str, str]:
    name, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in found.items() if value}


def _database(path: list[str]) -> int:
    if not path:
        return 0
    if len(path) > 1 or not path[0].isdecimal():
        raise ValueError("the database in a Redis URL is a number")
    return int(path[0])
