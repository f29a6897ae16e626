"""CEL (Common Expression Language, github.com/google/cel-spec) as people may write it in definitions and rules: checked, and bounded.

CEL ends always. Who uses it says which names and functions there are, and what it does about the macros, whose cost is not that of the
length of the input; a source is at most `LENGTH_MAX` characters, and nobody evaluates over more than `DATA_MAX` bytes.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, Final

import cel

LENGTH_MAX: Final = 1000
DATA_MAX: Final = 256 << 10
TEXT: Final = re.compile(r"""("{3}.*?"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""", re.DOTALL)
"""A literal of text."""
FUNCTIONS: Final = frozenset(
    {"size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bool", "has"}
)
"""The functions whose cost follows the length of their input."""


class ExpressionError(Exception):
    """An expression cannot be used or evaluated; the message says why, for the person who wrote it."""


class Program:
    """A compiled expression.

    Args:
        roots: the names it may use.
        functions: those it may call.
        bound: is given the source without its literals of text and returns the names its macros bind; raises ExpressionError where it
            uses macros that it may not.

    Attributes:
        names: those of the roots it uses.
    """

    __slots__ = ("_program", "names", "source")

    def __init__(
        self, source: str, roots: Collection[str], functions: Collection[str], bound: Callable[[str], set[str]]
    ) -> None:
        """Compile. Raises ExpressionError: syntax, an unknown name or function, or what `bound` raises."""
        try:
            program = cel.compile(source)
        except Exception as error:
            raise ExpressionError(f"syntax error: {short(error)}") from error
        names = set(program.variables()) - bound(TEXT.sub('""', source))
        for name in sorted(names - set(roots)):
            raise ExpressionError(unknown_name(name, roots))
        for function in program.functions():
            if function[0].isalpha() and function not in functions:
                raise ExpressionError(f"there is no function `{function}`")
        self.source = source
        self.names = frozenset(names)
        self._program = program

    def run(self, given: dict[str, Any]) -> Any:
        """Evaluate over values by name. Raises ExpressionError where something is not there or has another type."""
        try:
            return self._program.execute(given)
        except KeyError as error:
            raise ExpressionError(f"`{self.source}`: there is no {error}") from error
        except Exception as error:  # the library raises what the failing function of it raises
            raise ExpressionError(f"`{self.source}`: {short(error)}") from error


def check_length(source: str) -> None:
    """Raise ExpressionError where a source is too long."""
    if len(source) > LENGTH_MAX:
        raise ExpressionError(f"an expression has at most {LENGTH_MAX} characters")


def unknown_name(name: str, known: Collection[str]) -> str:
    """Return what to say of a name that there is not."""
    return f"there is no `{name[:64]}`; this expression knows {', '.join(sorted(known))}"


def short(error: Exception) -> str:
    """Return what went wrong, in a line."""
    text = str(error).partition("ERROR: <input>:")[2] or str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
