"""Expressions in rules of limits, over a task's type, labels and payload.

They are evaluated with every submission they concern, so what can cost more than the length of its input is left out: no macros, and a
payload of at most 256 KiB, which is read only where the expression names it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from mcp_control.expressions.programs import DATA_MAX, FUNCTIONS, ExpressionError, Program, check_length

_MACRO: Final = re.compile(r"\.\s*(all|exists|exists_one|map|filter)\s*\(", re.ASCII)
_value: Final = msgspec.json.Decoder().decode


class LimitExpression:
    """A compiled expression.

    Args:
        roots: the names it may use.
    """

    __slots__ = ("_program", "source")

    def __init__(self, source: str, roots: Sequence[str]) -> None:
        """Compile. Raises ExpressionError: syntax, an unknown name or function, a macro, or too long."""
        check_length(source)
        self.source = source
        self._program = Program(source, roots, FUNCTIONS, _no_macros)

    def _run(self, values: Mapping[str, object], payload: bytes) -> Any:
        names = self._program.names
        given = {name: value for name, value in values.items() if name in names}
        if "payload" in names:
            if len(payload) > DATA_MAX:
                raise ExpressionError(f"the payload has more than {DATA_MAX >> 10} KiB")
            given["payload"] = _value(payload)
        return self._program.run(given)

    def text(self, values: Mapping[str, object], payload: bytes) -> str:
        """Evaluate to a key: text, or a number or truth value as text. Raises ExpressionError where it is none of them."""
        found = self._run(values, payload)
        if isinstance(found, bool):
            return "true" if found else "false"
        if isinstance(found, str | int | float):
            return "".join(letter if letter.isprintable() else " " for letter in str(found))
        raise ExpressionError(f"`{self.source}` gives no text")

    def number(self, values: Mapping[str, object]) -> int:
        """Evaluate to a whole number. Raises ExpressionError where it is none."""
        found = self._run(values, b"null")
        if isinstance(found, bool) or not isinstance(found, int):
            raise ExpressionError(f"`{self.source}` gives no whole number")
        return found


def _no_macros(bare: str) -> set[str]:
    if macro := _MACRO.search(bare):
        raise ExpressionError(f"`{macro[1]}` is not available here")
    return set()
