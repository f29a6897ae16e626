"""Task handlers: a plain function with a task type, and how payloads, results and errors cross between them and the wire."""

import inspect
import traceback
import typing
from collections.abc import Callable
from typing import Any, Final, Generic, Literal, ParamSpec, TypeVar

import msgspec

from mcp_control.sdk.errors import Permanent, TaskAborted, Unavailable
from mcp_control.tasks.model import Failure

P = ParamSpec("P")
R = TypeVar("R")

Executor = Literal["async", "thread", "process"]
RESULT_LIMIT: Final = (1 << 20) - 1024  # a frame of 1 MiB holds the result and its envelope
TRACEBACK_LIMIT: Final = 16 * 1024
MESSAGE_LIMIT: Final = 2 * 1024

_encode = msgspec.json.Encoder().encode
_decode_any = msgspec.json.Decoder().decode
_UNTYPED: Final = (Any, object, dict, inspect.Parameter.empty)


class Handler(Generic[P, R]):
    """What `@agent.task(...)` returns: calling it calls the function, so that tests need no server and no agent.

    Attributes:
        name: the task type it does.
        version: version of that capability.
        executor: where it runs: on the event loop, in a thread, in a process of its own.
        timeout: seconds one attempt may take where the task names no limit itself.
        retries: attempts after the first one; None leaves it to the task's retry policy.
        wants_context: whether the function takes `(payload, ctx)`.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str,
        version: str = "1",
        executor: Executor | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        description: str = "",
    ) -> None:
        """Look at the function's signature once.

        Raises:
            TypeError: it takes neither `(payload)` nor `(payload, ctx)`, or these in another order, or cannot run in that executor.
        """
        self.function = function
        self.name = name
        self.version = version
        self.timeout = timeout
        self.retries = retries
        self.description = description or (inspect.getdoc(function) or "").partition("\n")[0]
        self.is_coroutine = inspect.iscoroutinefunction(function)
        self.executor: Executor = executor or ("async" if self.is_coroutine else "thread")
        if self.is_coroutine != (self.executor == "async"):
            raise TypeError(
                f"{name}: executor {self.executor!r} needs {'a coroutine' if self.executor == 'async' else 'a plain'} function"
            )
        if self.executor == "process" and "<locals>" in function.__qualname__:
            raise TypeError(f"{name}: a process imports its function by name, so it must stand at the top of a module")
        parameters = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(parameters) not in (1, 2):
            raise TypeError(f"{name}: a handler takes (payload) or (payload, ctx)")
        if parameters[0].name == "ctx":  # every attempt would fail by an error that does not say why
            raise TypeError(f"{name}: a handler takes (payload) or (payload, ctx), in this order")
        self.wants_context = len(parameters) == 2
        annotation = parameters[0].annotation
        if isinstance(annotation, str):
            annotation = typing.get_type_hints(function).get(parameters[0].name, Any)
        self.decode: Callable[[bytes | msgspec.Raw], Any] = (
            _decode_any
            if annotation in _UNTYPED or annotation == dict[str, Any]
            else msgspec.json.Decoder(annotation).decode
        )
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__qualname__ = function.__qualname__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function as it was written."""
        return self.function(*args, **kwargs)


def encode_result(value: object) -> bytes:
    """Return the JSON text of a result.

    Raises:
        Permanent: `invalid-result`, it has no JSON form; `result-too-large`, it is over 1 MiB (less the envelope of its frame).
    """
    try:
        encoded = _encode(value)
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise Permanent(f"the result has no JSON form: {error}", code="invalid-result") from error
    if len(encoded) > RESULT_LIMIT:
        raise Permanent(
            f"the result has {len(encoded):,} bytes, the limit is {RESULT_LIMIT:,}; upload it as an artifact",
            code="result-too-large",
        )
    return encoded


def failure_from(error: BaseException) -> Failure:
    """Say how an attempt failed: unknown errors are temporary, with a bounded traceback."""
    text = str(error)[:MESSAGE_LIMIT]
    if isinstance(error, TaskAborted):
        return Failure(
            error_class=error.error_class,
            code=error.code,
            message=text or type(error).__name__,
            data=error.data,
            retry_after=error.retry_after if isinstance(error, Unavailable) else None,
        )
    trace = "".join(traceback.format_exception(error))
    if len(trace) > TRACEBACK_LIMIT:
        half = TRACEBACK_LIMIT // 2
        trace = f"{trace[:half]}\n… {len(trace) - TRACEBACK_LIMIT:,} characters left out …\n{trace[-half:]}"
    return Failure(code=type(error).__name__, message=text or type(error).__name__, traceback=trace)


def invalid_payload(error: Exception) -> Failure:
    """Say that a payload does not have the handler's type: no repetition will help."""
    return Failure(error_class="permanent", code="invalid-payload", message=str(error)[:MESSAGE_LIMIT])


def capped(failure: Failure, retries: int | None, attempt: int) -> Failure:
    """Make a temporary failure permanent when the handler's own number of retries is used up; asking for patience costs none."""
    if retries is None or failure.error_class != "temporary" or attempt <= retries or failure.retry_after is not None:
        return failure
    return msgspec.structs.replace(failure, error_class="permanent")
