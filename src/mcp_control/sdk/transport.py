"""HTTP as the SDK speaks it: one request description, one answer, and two thin shells (blocking and async) that retry alike.

Retried are: no connection at all, and 409, 429 or 503 that the server marks retryable, with its Retry-After. A request that may have
reached the server is repeated only when repeating it is harmless: it reads, or it carries an idempotency key, which stays the same.
"""

import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, TypeVar

import httpx2
import msgspec
import stamina

from mcp_control.sdk.errors import ApiProblem, Conflicting, NotNow, SdkError, Unreachable, problem_from

T = TypeVar("T")
API: Final = "/api/v1"
ATTEMPTS: Final = 6
PATIENCE_SECONDS: Final = 30.0
_HARMLESS: Final = frozenset({"GET", "HEAD", "DELETE", "PUT"})


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request, as data.

    Attributes:
        path: below `/api/v1`, or from the root where it starts with `//`.
        body: JSON bytes, or None.
        timeout: seconds to wait for the answer.
        repeatable: it may be sent twice without doing anything twice.
        statuses: error statuses that are answers here and not exceptions.
    """

    method: str = "GET"
    path: str
    params: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    timeout: float = 30.0
    repeatable: bool = False
    statuses: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """The path from the server's root."""
        return self.path[1:] if self.path.startswith("//") else API + self.path


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer."""

    status: int
    headers: httpx2.Headers
    body: bytes

    def json(self, type: Any = Any) -> Any:
        """Return the body as this type. Raises SdkError where it is something else, e.g. a proxy's page."""
        try:
            return msgspec.json.decode(self.body, type=type)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SdkError(f"the server's answer was not understood: {error}") from error


class _Unsure(Unreachable):
    """The request may have taken effect, so it is not repeated."""


def _headers(token: str, call: Call) -> list[tuple[str, str]]:
    headers = [*call.headers]
    if token:
        headers.append(("Authorization", f"Bearer {token}"))
    if call.body is not None and not any(name.lower() == "content-type" for name, _ in headers):
        headers.append(("Content-Type", "application/json"))
    return headers


def retry_after(headers: httpx2.Headers) -> float | None:
    """Return the seconds of a Retry-After header; a date or nothing is None."""
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None


def _reply(call: Call, response: httpx2.Response) -> Reply:
    if response.status_code >= 400 and response.status_code not in call.statuses:
        raise problem_of(response)
    return Reply(status=response.status_code, headers=response.headers, body=response.content)


def problem_of(response: httpx2.Response) -> ApiProblem:
    """Return the exception for an error answer whose body was read."""
    return problem_from(
        response.status_code, response.content, response.headers.get("x-request-id", ""), retry_after(response.headers)
    )


def _trouble(call: Call, url: str, error: httpx2.TransportError) -> Unreachable:
    never_sent = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
    harmless = call.repeatable or call.method in _HARMLESS
    text = f"no answer from {url}: {str(error) or type(error).__name__}"
    return Unreachable(text) if never_sent or harmless else _Unsure(text)


def _again(error: Exception) -> bool | float:
    """Say whether to repeat, or after how many seconds: equal jitter over Retry-After, so that patience asked for is patience given."""
    if isinstance(error, Conflicting) and not error.retryable:
        return False
    if isinstance(error, NotNow | Conflicting):
        if error.retry_after is None:
            return error.retryable
        return error.retry_after * random.uniform(1.0, 1.5)  # noqa: S311 - jitter is no secret
    return isinstance(error, Unreachable) and not isinstance(error, _Unsure)


_LIMITS: Final = httpx2.Limits(max_connections=100, max_keepalive_connections=50, keepalive_expiry=4.0)


class Transport:
    """Blocking shell."""

    def __init__(self, url: str, token: str, *, retry: bool = True, http: httpx2.BaseTransport | None = None) -> None:
        self.url = url
        self.token = token
        self._retry = retry
        self._http = httpx2.Client(base_url=url, limits=_LIMITS, transport=http, follow_redirects=False)

    def send(self, call: Call) -> Reply:
        """Send a request and return its answer. Raises ApiProblem, Unreachable."""
        return self.repeated(lambda: self._once(call))

    def repeated(self, once: Callable[[], T], attempts: int | None = ATTEMPTS) -> T:
        """Do something of this transport again for as long as that may help: `attempts` times, None as often as 30 s allow."""
        try:
            return once()
        except (Unreachable, NotNow, Conflicting) as error:
            failure: Exception | None = error
        for attempt in stamina.retry_context(
            on=_again, attempts=attempts if self._retry else 1, timeout=PATIENCE_SECONDS, wait_max=5.0
        ):
            with attempt:
                if failure is not None:
                    # The first failure is retold here, so that a request that succeeds at once costs no bookkeeping.
                    first, failure = failure, None
                    raise first
                return once()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, call: Call) -> Reply:
        try:
            response = self._http.request(
                call.method,
                call.url,
                params=call.params or None,
                headers=_headers(self.token, call),
                content=call.body,
                timeout=httpx2.Timeout(call.timeout, connect=10.0),
            )
        except httpx2.TransportError as error:
            raise _trouble(call, self.url, error) from error
        return _reply(call, response)

    @contextmanager
    def stream(self, call: Call, content: Iterable[bytes] | None = None) -> Iterator[httpx2.Response]:
        """Send a request whose body or answer is a stream; not retried. Raises ApiProblem, Unreachable."""
        try:
            with self._http.stream(
                call.method,
                call.url,
                params=call.params or None,
                headers=_headers(self.token, call),
                content=content if content is not None else call.body,
                timeout=httpx2.Timeout(call.timeout, connect=10.0),
            ) as response:
                if response.status_code >= 400 and response.status_code not in call.statuses:
                    response.read()
                    raise problem_of(response)
                yield response
        except httpx2.TransportError as error:
            raise _trouble(call, self.url, error) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncTransport:
    """Async shell; the same rules."""

    def __init__(
        self, url: str, token: str, *, retry: bool = True, http: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self.url = url
        self.token = token
        self._retry = retry
        self._http = httpx2.AsyncClient(base_url=url, limits=_LIMITS, transport=http, follow_redirects=False)

    async def send(self, call: Call) -> Reply:
        """Send a request and return its answer. Raises ApiProblem, Unreachable."""
        return await self.repeated(lambda: self._once(call))

    async def repeated(self, once: Callable[[], Awaitable[T]], attempts: int | None = ATTEMPTS) -> T:
        """Do something of this transport again for as long as that may help: `attempts` times, None as often as 30 s allow."""
        try:
            return await once()
        except (Unreachable, NotNow, Conflicting) as error:
            failure: Exception | None = error
        async for attempt in stamina.retry_context(
            on=_again, attempts=attempts if self._retry else 1, timeout=PATIENCE_SECONDS, wait_max=5.0
        ):
            with attempt:
                if failure is not None:
                    # The first failure is retold here, so that a request that succeeds at once costs no bookkeeping.
                    first, failure = failure, None
                    raise first
                return await once()
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _once(self, call: Call) -> Reply:
        try:
            response = await self._http.request(
                call.method,
                call.url,
                params=call.params or None,
                headers=_headers(self.token, call),
                content=call.body,
                timeout=httpx2.Timeout(call.timeout, connect=10.0),
            )
        except httpx2.TransportError as error:
            raise _trouble(call, self.url, error) from error
        return _reply(call, response)

    @asynccontextmanager
    async def stream(self, call: Call, content: AsyncIterable[bytes] | None = None) -> AsyncIterator[httpx2.Response]:
        """Send a request whose body or answer is a stream; not retried. Raises ApiProblem, Unreachable."""
        try:
            async with self._http.stream(
                call.method,
                call.url,
                params=call.params or None,
                headers=_headers(self.token, call),
                content=content if content is not None else call.body,
                timeout=httpx2.Timeout(call.timeout, connect=10.0),
            ) as response:
                if response.status_code >= 400 and response.status_code not in call.statuses:
                    await response.aread()
                    raise problem_of(response)
                yield response
        except httpx2.TransportError as error:
            raise _trouble(call, self.url, error) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()
