"""`with` values: JSON in which strings of the form `${{ expression }}` are replaced.

A string that is one expression and nothing else becomes the value with its type. Expressions inside a longer string become text: strings
as they are, everything else as compact JSON. `$${{` stands for a literal `${{`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Final

import msgspec

from mcp_control.expressions.programs import ExpressionError
from mcp_control.pipelines.expressions import Expression, Raw, Scope, kind_of

_OPEN: Final = re.compile(r"(\$\$\{\{)|\$\{\{(.*?)\}\}", re.DOTALL)
_encode: Final = msgspec.json.Encoder().encode
_text: Final = msgspec.json.Decoder(str).decode
_any: Final = msgspec.json.Decoder().decode

Node = Expression | list["Node"] | dict[str, "Node"] | tuple["str | Expression", ...] | msgspec.Raw


class Template:
    """A compiled `with`.

    Attributes:
        roots, stages: what all its expressions together name.
    """

    __slots__ = ("_constant", "_root", "expressions", "roots", "stages")

    def __init__(self, value: Mapping[str, object]) -> None:
        """Compile. Raises ExpressionError for the first expression that cannot be; `problems` lists all of them."""
        self.expressions: list[Expression] = []
        self._root = self._compile(value)
        self._constant = _encode(value) if not self.expressions and isinstance(self._root, msgspec.Raw) else None
        self.roots = frozenset[str]().union(*(expression.roots for expression in self.expressions))
        self.stages = frozenset[str]().union(*(expression.stages for expression in self.expressions))

    def _compile(self, value: object) -> Node:
        if isinstance(value, str) and "${{" in value:
            node = _parts(value)
            self.expressions += (
                [node] if isinstance(node, Expression) else [part for part in node if isinstance(part, Expression)]
            )
            return node
        if isinstance(value, Mapping):
            members = {name: self._compile(child) for name, child in value.items()}
            return (
                members
                if any(not isinstance(child, msgspec.Raw) for child in members.values())
                else msgspec.Raw(_encode(value))
            )
        if isinstance(value, list | tuple):
            children = [self._compile(child) for child in value]
            return (
                children
                if any(not isinstance(child, msgspec.Raw) for child in children)
                else msgspec.Raw(_encode(value))
            )
        return msgspec.Raw(_encode(value))

    def render(self, scope: Scope, beside: Mapping[str, Raw] | None = None) -> bytes:
        """Return the payload as JSON.

        Args:
            scope: what expressions see.
            beside: members to add where `with` has none of that name.

        Raises:
            ExpressionError: an expression cannot be evaluated.
        """
        if self._constant is not None and not beside:
            return self._constant
        root = self._root
        if isinstance(root, msgspec.Raw):
            members: dict[str, object] = dict(msgspec.json.decode(root, type=dict[str, msgspec.Raw]))
        else:
            assert isinstance(root, dict)
            members = {
                name: msgspec.Raw(node.raw(scope)) if isinstance(node, Expression) else _render(node, scope)
                for name, node in root.items()
            }
        for name, text in (beside or {}).items():
            if name not in members:
                members[name] = msgspec.Raw(text)
        return _encode(members)


def problems(value: object, pointer: str) -> Iterator[tuple[str, str]]:
    """Yield pointer and message of every expression in a `with` that cannot be compiled."""
    for where, text in _strings(value, pointer):
        try:
            _parts(text)
        except ExpressionError as error:
            yield where, str(error)


def expressions_in(value: object, pointer: str) -> Iterator[tuple[str, Expression]]:
    """Yield pointer and expression for every expression in a `with` that compiles."""
    for where, text in _strings(value, pointer):
        try:
            node = _parts(text)
        except ExpressionError:
            continue
        for part in (node,) if isinstance(node, Expression) else node:
            if isinstance(part, Expression):
                yield where, part


def _strings(value: object, pointer: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if "${{" in value:
            yield pointer, value
    elif isinstance(value, Mapping):
        for name, child in value.items():
            token = str(name)[:64].replace("~", "~0").replace("/", "~1")
            yield from _strings(child, f"{pointer}/{token}")
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _strings(child, f"{pointer}/{index}")


def _parts(text: str) -> "Expression | tuple[str | Expression, ...]":
    parts: list[str | Expression] = []
    end = 0
    for match in _OPEN.finditer(text):
        if match.start() > end:
            parts.append(text[end : match.start()])
        parts.append("${{" if match[1] else Expression(match[2]))
        end = match.end()
    if end < len(text):
        parts.append(text[end:])
    if any(isinstance(part, str) and "${{" in part and part != "${{" for part in parts):
        raise ExpressionError("`${{` without its `}}`")
    only = parts[0]
    return only if len(parts) == 1 and isinstance(only, Expression) else tuple(parts)


def _render(node: Node, scope: Scope) -> object:
    if isinstance(node, msgspec.Raw):
        return node
    if isinstance(node, Expression):
        return msgspec.Raw(node.raw(scope))
    if isinstance(node, dict):
        return {name: _render(child, scope) for name, child in node.items()}
    if isinstance(node, list):
        return [_render(child, scope) for child in node]
    return "".join(part if isinstance(part, str) else _as_text(part.raw(scope)) for part in node)


def _as_text(text: Raw) -> str:
    return _text(text) if kind_of(text) == "text" else _encode(_any(text)).decode()
