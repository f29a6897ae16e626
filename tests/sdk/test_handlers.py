"""What a function must look like to be a handler is said when it is declared, not by every attempt."""

from collections.abc import Callable
from typing import Any

import pytest

from mcp_control.sdk.handlers import Handler


def no_payload() -> None: ...
def swapped(ctx: Any, payload: Any) -> None: ...
def three(payload: Any, ctx: Any, more: Any) -> None: ...
def plain(payload: Any) -> Any:
    return payload


@pytest.mark.parametrize(
    ("function", "says"), [(no_payload, "takes"), (swapped, "in this order"), (three, "takes"), (plain, "coroutine")]
)
def test_a_function_that_can_be_no_handler_is_refused_when_it_is_declared(
    function: Callable[..., Any], says: str
) -> None:
    """The error names the task type and says what is expected."""
    executor = "async" if function is plain else None
    with pytest.raises(TypeError, match=f"resize: .*{says}"):
        Handler(function, name="resize", executor=executor)


def test_a_handler_is_called_as_the_function_it_is() -> None:
    """Tests of a handler need no server."""
    assert Handler(plain, name="resize")({"width": 3}) == {"width": 3}
