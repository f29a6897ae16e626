"""Expressions over JSON: plain paths (`stages.ingest.output.files[0].id`, `items[*].rows`) and CEL for everything else.

A path is followed through the JSON text level by level and its end is handed on as the text that stood there; nothing beside the way is
built as objects. Other expressions are CEL (Common Expression Language, github.com/google/cel-spec). CEL ends always, but its macros
cost the square or more of a list's length, so they are bounded: they do not nest, one `map` at most, over few values.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from mcp_control.expressions.programs import (
    DATA_MAX,
    FUNCTIONS,
    TEXT,
    ExpressionError,
    Program,
    check_length,
    short,
    unknown_name,
)

MACROS_MAX: Final = 4
MACRO_VALUES_MAX: Final = 1000
ROOTS: Final = frozenset({"params", "stages", "run", "item", "index", "items", "failures", "output"})
ALL: Final = "*"  # a step that stands for every element of a list

Raw = bytes  # or `msgspec.Raw`, which the type checker holds to be bytes
Step = str | int

_FUNCTIONS: Final = FUNCTIONS | {
    "bytes",
    "type",
    "dyn",
    "max",
    "min",
    "timestamp",
    "duration",
    "getFullYear",
    "getMonth",
    "getDate",
    "getDayOfMonth",
    "getDayOfWeek",
    "getDayOfYear",
    "getHours",
    "getMinutes",
    "getSeconds",
    "getMilliseconds",
}
_PATH: Final = re.compile(
    r"""\s*([A-Za-z_]\w*)((?:\.[A-Za-z_]\w*|\[\d{1,9}\]|\[\*\]|\["[^"\\]*"\]|\['[^'\\]*'\])*)\s*""", re.ASCII
)
_STEP: Final = re.compile(r"""\.([A-Za-z_]\w*)|\[(\d{1,9})\]|(\[\*\])|\["([^"\\]*)"\]|\['([^'\\]*)'\]""", re.ASCII)
_REFERENCE: Final = re.compile(
    r"""(?<![\w.])(stages|params)\b\s*(?:\.\s*([A-Za-z_]\w*)|\[\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*\])?""", re.ASCII
)
_MACRO: Final = re.compile(r"\.\s*(all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_]\w*)\s*,", re.ASCII)
_STATE: Final = re.compile(r"\.\s*state\b", re.ASCII)
_KEYWORDS: Final = frozenset({"true", "false", "null", "in"})

_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_array: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
_value: Final = msgspec.json.Decoder().decode
_encode: Final = msgspec.json.Encoder().encode


class Scope:
    """The values an expression may name, as JSON text.

    Args:
        params: parameters by name.
        output_of: gives the output of a stage; raises what it likes when it cannot.
        run: `id`, `pipeline`, `version`, `round` of the run.
        item, index: the element of a fan-out.
        items: results of all items, for the combine task.
        failures: what became of the items that did not complete, for the combine task.
        output: the stage's own output, for its gate.
        state_of: gives the state of a stage.
    """

    __slots__ = ("_members", "failures", "index", "item", "items", "output", "output_of", "params", "run", "state_of")

    def __init__(
        self,
        params: Mapping[str, Raw],
        output_of: Callable[[str], Raw],
        run: Mapping[str, object],
        *,
        item: Raw | None = None,
        index: int | None = None,
        items: Sequence[Raw] | None = None,
        failures: Sequence[Raw] | None = None,
        output: Raw | None = None,
        state_of: Callable[[str], str] | None = None,
    ) -> None:
        self.params = params
        self.output_of = output_of
        self.run = run
        self.item = item
        self.index = index
        self.items = items
        self.failures = failures
        self.output = output
        self.state_of = state_of
        self._members: dict[str, dict[str, msgspec.Raw]] = {}

    def inside(self, stage: str, path: tuple[Step, ...]) -> Raw:
        """Return what a path leads to in the output of a stage; its members are told apart once. Raises ExpressionError."""
        output = self.output_of(stage)
        first = path[0] if path else ALL
        if not isinstance(first, str) or first == ALL:
            return _follow(output, path)
        members = self._members.get(stage)
        if members is None:
            try:
                members = self._members[stage] = _object(output)
            except msgspec.MsgspecError:
                return _follow(output, path)  # says what it is instead
        text = members.get(first)
        return _follow(output, path) if text is None else _follow(text, path[1:])

    def raw(self, root: str) -> Raw:
        """Return a root other than `stages` as JSON text."""
        if root == "params":
            return _encode({name: msgspec.Raw(value) for name, value in self.params.items()})
        if root == "run":
            return _encode(self.run)
        if root == "items" and self.items is not None:
            return join(self.items)
        if root == "failures" and self.failures is not None:
            return join(self.failures)
        if root == "index" and self.index is not None:
            return str(self.index).encode()
        if root == "item" and self.item is not None:
            return self.item
        if root == "output" and self.output is not None:
            return self.output
        raise ExpressionError(f"`{root}` has no value here")

    def state(self, stage: str) -> str:
        """Return the state of a stage. Raises ExpressionError where there is none."""
        if self.state_of is None:
            raise ExpressionError("the state of a stage is known in the run only")
        return self.state_of(stage)


class Expression:
    """A compiled expression.

    Attributes:
        roots: the names at the beginning that it uses.
        stages, params: ids of stages and names of parameters that it mentions.
    """

    __slots__ = ("_inside", "_path", "_program", "_root", "_stage", "params", "roots", "source", "stages")

    def __init__(self, source: str) -> None:
        """Compile.

        Raises:
            ExpressionError: syntax, an unknown name or function, or over the limits.
        """
        self.source = unwrapped(source)
        if not self.source:
            raise ExpressionError("the expression is empty")
        check_length(self.source)
        self._path: tuple[Step, ...] | None = None
        self._program: Program | None = None
        self._root = self._stage = ""
        self._inside: tuple[Step, ...] = ()
        match = _PATH.fullmatch(self.source)
        if match and match[1] not in _KEYWORDS:
            self._plain(match)
        else:
            self._cel()

    def _plain(self, match: re.Match[str]) -> None:
        self._root = match[1]
        if self._root not in ROOTS:
            raise ExpressionError(unknown_name(self._root, ROOTS))
        path = tuple(
            int(number) if number else ALL if every else name or double or single
            for name, number, every, double, single in _STEP.findall(match[2])
        )
        self.roots = frozenset({self._root})
        first = path[0] if path else None
        self.stages, self.params = frozenset[str](), frozenset[str]()
        if self._root == "stages":
            known = len(path) > 1 and (path[1] == "output" or path[1:] == ("state",))
            if not known or not isinstance(first, str) or first == ALL:
                raise ExpressionError("a stage is named as in `stages.<id>.output` or `stages.<id>.state`")
            self.stages = frozenset({first})
            self._stage, self._inside = first, path[2:]
        elif self._root == "params" and isinstance(first, str) and first != ALL:
            self.params = frozenset({first})
        self._path = path

    def _cel(self) -> None:
        program = Program(self.source, ROOTS, _FUNCTIONS, _check_macros)
        stages: set[str] = set()
        params: set[str] = set()
        for root, dotted, double, single in _REFERENCE.findall(self._without_values()):
            name = dotted or double or single
            if root == "params":
                if name:
                    params.add(name)
            elif name:
                stages.add(name)
            else:
                raise ExpressionError("a stage is named as in `stages.<id>.output` or `stages.<id>.state`")
        self._program = program
        self.roots = program.names
        self.stages = frozenset(stages)
        self.params = frozenset(params)

    def _without_values(self) -> str:
        """The source without its string literals, except those that are an index."""
        parts = TEXT.split(self.source)
        for at in range(1, len(parts), 2):
            if not (parts[at - 1].rstrip().endswith("[") and parts[at + 1].lstrip().startswith("]")):
                parts[at] = '""'
        return "".join(parts)

    def raw(self, scope: Scope) -> Raw:
        """Evaluate to JSON text.

        Raises:
            ExpressionError: something is not there, has another type, or is too large.
        """
        if self._path is None:
            try:
                return _encode(self._run(scope))
            except (TypeError, ValueError, OverflowError) as error:
                raise ExpressionError(f"`{self.source}` gives what JSON cannot say: {short(error)}") from error
        path = self._path
        try:
            if self._root == "stages":
                if path[1] == "state":
                    return _encode(scope.state(self._stage))
                return scope.inside(self._stage, self._inside)
            if self._root == "params" and path and path[0] != ALL:
                value = scope.params.get(str(path[0]))
                if value is None:
                    raise ExpressionError(f"there is no parameter `{path[0]}`")
                return _follow(value, path[1:]) if len(path) > 1 else value
            if self._root == "items" and path and scope.items is not None:
                if path[0] == ALL:
                    return join([_follow(value, path[1:]) for value in scope.items])
                if isinstance(path[0], int):
                    if path[0] >= len(scope.items):
                        raise ExpressionError(f"there are only {len(scope.items)}, so no [{path[0]}]")
                    return _follow(scope.items[path[0]], path[1:])
            return _follow(scope.raw(self._root), path)
        except ExpressionError as error:
            raise ExpressionError(f"`{self.source}`: {error}") from error

    def value(self, scope: Scope) -> Any:
        """Evaluate to a Python value. Raises ExpressionError as `raw` does."""
        return _value(self.raw(scope)) if self._path is not None else self._run(scope)

    def _run(self, scope: Scope) -> Any:
        assert self._program is not None
        states = {name: scope.state(name) for name in self.stages} if _STATE.search(self.source) else {}
        outputs = {name: scope.output_of(name) for name in self.stages}
        others = {root: scope.raw(root) for root in self.roots if root != "stages"}
        if sum(map(_size, outputs.values())) + sum(map(_size, others.values())) > DATA_MAX:
            raise ExpressionError(f"`{self.source}` looks at more than {DATA_MAX >> 10} KiB; only a plain path may")
        given = {root: _value(text) for root, text in others.items()}
        given["stages"] = {name: {"output": _value(text), "state": states.get(name)} for name, text in outputs.items()}
        if _MACRO.search(self.source) and sum(map(_count, given.values())) > MACRO_VALUES_MAX:
            raise ExpressionError(
                f"`{self.source}`: macros look at up to {MACRO_VALUES_MAX} values; a path with [*] has no limit"
            )
        return self._program.run(given)


def unwrapped(source: str) -> str:
    """Return an expression without the `${{ }}` that may stand around it."""
    text = source.strip()
    return text[3:-2].strip() if text.startswith("${{") and text.endswith("}}") else text


def join(values: Sequence[Raw]) -> bytes:
    """Return the JSON array of values that are JSON text."""
    return b"[" + b",".join(map(bytes, values)) + b"]"


def elements(text: Raw) -> list[msgspec.Raw]:
    """Return the elements of a JSON array as text. Raises ExpressionError when it is none."""
    try:
        return _array(text)
    except msgspec.MsgspecError as error:
        raise ExpressionError(f"must be a list, got {kind_of(text)}") from error


def kind_of(text: Raw) -> str:
    """Return what kind of JSON value a text is, in words."""
    first = bytes(memoryview(text)[:64]).lstrip()[:1]
    return {b"{": "an object", b"[": "a list", b'"': "text", b"t": "true", b"f": "false", b"n": "null"}.get(
        first, "a number"
    )


def _follow(text: Raw, path: Sequence[Step]) -> Raw:
    for at, step in enumerate(path):
        if step == ALL:
            return join([_follow(element, path[at + 1 :]) for element in elements(text)])
        try:
            if isinstance(step, int):
                text = _array(text)[step]
            else:
                text = _object(text)[step]
        except KeyError as error:
            raise ExpressionError(f"there is no `{step}`") from error
        except IndexError as error:
            raise ExpressionError(f"there is no [{step}]") from error
        except msgspec.MsgspecError as error:
            wanted = f"a list for [{step}]" if isinstance(step, int) else f"an object for `.{step}`"
            raise ExpressionError(f"needs {wanted}, got {kind_of(text)}") from error
    return text


def _check_macros(bare: str) -> set[str]:
    """Return the names that macros bind. Raises ExpressionError when macros nest or are many, or `map` copies what is around it."""
    found = list(_MACRO.finditer(bare))
    if len(found) > MACROS_MAX:
        raise ExpressionError(f"at most {MACROS_MAX} of all, exists, map and filter")
    if sum(match[1] == "map" for match in found) > 1:
        raise ExpressionError("at most one `map`")
    end = 0
    for match in found:
        if match.start() < end:
            raise ExpressionError("all, exists, map and filter do not nest")
        if match[2] in ROOTS:
            raise ExpressionError(f"`{match[2]}` has a meaning already; name the element otherwise")
        end = _closing(bare, bare.index("(", match.start()))
        body = bare[match.end() : end]
        if match[1] == "map" and re.search(rf"(?<![\w.])(?:{'|'.join(ROOTS)})\b", body):
            raise ExpressionError("`map` may use the element alone")
    return {match[2] for match in found}


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


def _count(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_count, value))
    return 1


def _size(text: Raw) -> int:
    return len(memoryview(text))
