"""Which Host names are answered: a page that resolves its own name to this server's address must not reach it as its own."""

from collections.abc import Iterable, Mapping

from mcp_control.kernel.errors import Problem


class MisdirectedRequest(Problem):
    """The request is for a host that this server does not answer for (RFC 9110, 15.5.20)."""

    code, status, title = "misdirected-request", 421, "Misdirected request"


class Hosts:
    """The Host names answered.

    Args:
        allowed: names or addresses without port; empty: any.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(name.strip("[]").lower() for name in allowed)

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raise MisdirectedRequest where the Host header names none of them."""
        if self._allowed and host_name(headers.get(b"host", b"").decode("latin-1")) not in self._allowed:
            raise MisdirectedRequest("this server does not answer for the host that the request names")


def host_name(host: str) -> str:
    """Return the name in a Host header: without port and brackets, in lower case. Pure."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")
