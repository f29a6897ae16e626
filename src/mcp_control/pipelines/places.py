"""Where in a text the faults of a definition are: from JSON pointers to lines and columns. YAML reads JSON, so one way does for both."""

from collections.abc import Sequence
from typing import Final

import yaml
from msgspec.structs import replace

from mcp_control.kernel.errors import FieldError
from mcp_control.pipelines.definition import composed, no_collections

_CUT: Final = 64  # pointers cut longer keys


def located(text: str | bytes, errors: Sequence[FieldError]) -> list[FieldError]:
    """Return the errors with line and column, from 1, of the value each names, or of what it is missing from; as they are if unreadable."""
    try:
        with no_collections(text):
            root = composed(text)
            return list(errors) if root is None else [_placed(root, error) for error in errors]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return list(errors)


def _placed(root: yaml.Node, error: FieldError) -> FieldError:
    if error.line is not None:
        return error
    mark = root.start_mark
    node = root
    for token in error.pointer.removeprefix("#").split("/")[1:]:
        found = _step(node, token.replace("~1", "/").replace("~0", "~"))
        if found is None:
            break
        node, mark = found
    return replace(error, line=mark.line + 1, column=mark.column + 1)


def _step(node: yaml.Node, token: str) -> tuple[yaml.Node, yaml.Mark] | None:
    """Return the child and where it begins: a member begins at its key."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == token:
                return value, key.start_mark
        for key, value in node.value:
            if len(token) >= _CUT and isinstance(key, yaml.ScalarNode) and key.value.startswith(token):
                return value, key.start_mark
    elif isinstance(node, yaml.SequenceNode) and token.isdigit() and int(token) < len(node.value):
        child: yaml.Node = node.value[int(token)]
        return child, child.start_mark
    return None
