"""Expressions in rules of limits: CEL (github.com/google/cel-spec) over a task's type, labels and payload.

They are evaluated with every submission they concern, so what can cost more than the length of its input is left out: no macros, and a
payload of at most 256 KiB, which is read only where the expression names it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import cel
import msgspec

LENGTH_MAX: Final = 1000
DATA_MAX: Final = 256 << 10
_FUNCTIONS: Final = frozenset(
    {"size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bool", "has"}
)
_TEXT: Final = re.compile(r"""("{3}.*?"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""", re.DOTALL)
_MACRO: Final = re.compile(r"\.\s*(all|exists|exists_one|map|filter)\s*\(", re.ASCII)
_value: Final = msgspec.json.Decoder().decode


class ExpressionError(Exception):
    """An expression cannot be used or evaluated; the message says why, for the person who wrote it."""


class LimitExpression:
    """A compiled expression.

    Args:
        roots: the names it may use.
    """

    __slots__ = ("_names", "_program", "source")

    def __init__(self, source: str, roots: Sequence[str]) -> None:
        """Compile. Raises ExpressionError: syntax, an unknown name or function, a macro, or too long."""
        if len(source) > LENGTH_MAX:
            raise ExpressionError(f"an expression has at most {LENGTH_MAX} characters")
        try:
            program = cel.compile(source)
        except Exception as error:
            raise ExpressionError(f"syntax error: {_short(error)}") from error
        if macro := _MACRO.search(_TEXT.sub('""', source)):
            raise ExpressionError(f"`{macro[1]}` is not available here")
        for name in sorted(set(program.variables()) - set(roots)):
            raise ExpressionError(f"there is no `{name[:64]}`; this expression knows {', '.join(roots)}")
        for function in program.functions():
            if function[0].isalpha() and function not in _FUNCTIONS:
                raise ExpressionError(f"there is no function `{function}`")
        self.source = source
        self._program = program
        self._names = frozenset(program.variables())

    def _run(self, values: Mapping[str, object], payload: bytes) -> Any:
        given = {name: value for name, value in values.items() if name in self._names}
        if "payload" in self._names:
            if len(payload) > DATA_MAX:
                raise ExpressionError(f"the payload has more than {DATA_MAX >> 10} KiB")
            given["payload"] = _value(payload)
        try:
            return self._program.execute(given)
        except Exception as error:  # the library raises what the failing function of it raises
            raise ExpressionError(f"`{self.source}`: {_short(error)}") from error

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


def _short(error: Exception) -> str:
    text = str(error).partition("ERROR: <input>:")[2] or str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
