"""Definitions from YAML and JSON. Both give the same `PipelineSpec`; what it means is checked by `validate.py`."""

import json
import math
import re
from typing import Final, NoReturn

import msgspec
import yaml

from mcp_control.kernel.errors import DuplicateKey, FieldError, Invalid, MalformedJson, PayloadTooLarge, TooDeep
from mcp_control.pipelines.model import Body, Metadata, Param, PipelineSpec, Stage

TEXT_MAX: Final = 1 << 20
DEPTH_MAX: Final = 48  # a payload may have 32 levels, and `spec.stages[0].with` stands around it
NODES_MAX: Final = 500_000
ERRORS_MAX: Final = 50
_decode: Final = msgspec.json.Decoder(PipelineSpec).decode
_STEP: Final = re.compile(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]")


# YAML reduced to what JSON can say: dates stay text.
_RESOLVERS: Final = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def from_yaml(text: str | bytes) -> PipelineSpec:
    """Read a definition written in YAML.

    Raises:
        PayloadTooLarge: the text is larger than 1 MiB.
        Invalid: it is not YAML, grows beyond bounds by its aliases, or is no definition; all places are named.
        TooDeep, DuplicateKey: as for JSON.
    """
    _check_size(text)
    try:
        _check_depth(text)
        loader = _loader(text)
        loader.yaml_implicit_resolvers = _RESOLVERS
        try:
            node = loader.get_single_node()
            if node is None:
                raise Invalid(
                    "the document is empty", errors=[FieldError(pointer="#", code="wrong-type", detail="empty")]
                )
            _expanded(node, {}, 0)
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not readable as YAML"
        detail = f"malformed YAML{where}: {what}"
        raise Invalid(detail, errors=[FieldError(pointer="#", code="malformed-yaml", detail=detail)]) from error
    except RecursionError as error:
        raise TooDeep from error
    return from_data(data)


def from_json(text: str | bytes) -> PipelineSpec:
    """Read a definition written in JSON.

    Raises:
        PayloadTooLarge, MalformedJson, TooDeep, DuplicateKey: the text itself.
        Invalid: it is no definition; all places are named.
    """
    _check_size(text)
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise TooDeep from error
    except ValueError as error:
        raise MalformedJson(f"malformed JSON: {error}") from error
    return from_data(data)


def from_data(data: object) -> PipelineSpec:
    """Read a definition from what a JSON or YAML parser returned.

    Raises:
        Invalid: it is no definition; at most 50 places are named, each with its pointer.
        TooDeep: it is nested more than 48 levels deep.
    """
    found: list[FieldError] = []
    _check_values(data, "#", 0, found)
    if not found:
        try:
            return msgspec.convert(data, PipelineSpec)
        except msgspec.ValidationError as error:
            found = _all_errors(data) or [_field_error("#", error)]
    raise Invalid(found[0].detail, errors=found[:ERRORS_MAX])


def to_json(spec: PipelineSpec) -> bytes:
    """Return the definition as JSON; written the same way, it gives the same bytes, whether in YAML, JSON or Python."""
    # Decoded once, so that 60 and 60.0 seconds read the same, whoever wrote them.
    return msgspec.json.encode(_decode(msgspec.json.encode(spec)), order="deterministic")


def _check_size(text: str | bytes) -> None:
    if len(text) > TEXT_MAX:
        raise PayloadTooLarge("a pipeline definition has at most 1 MiB")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKey(f"the key {key[:64]!r} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _loader(text: str | bytes) -> yaml.SafeLoader | yaml.CSafeLoader:
    return yaml.CSafeLoader(text) if yaml.__with_libyaml__ else yaml.SafeLoader(text)


def _check_depth(text: str | bytes) -> None:
    """Refuse deep nesting before anything recurses over it: the composer in C would overflow its stack."""
    loader = _loader(text)
    depth = 0
    try:
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > DEPTH_MAX:
                    raise TooDeep(f"nested more than {DEPTH_MAX} levels deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return how many nodes there are once every alias is written out; a few lines of aliases can stand for billions."""
    if depth > DEPTH_MAX:
        raise TooDeep(f"nested more than {DEPTH_MAX} levels deep, or an alias that contains itself")
    known = sizes.get(id(node))
    if known is not None:
        return known
    size = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise DuplicateKey(
                    f"the key {key.value[:64]!r} stands twice in one mapping (line {key.start_mark.line + 1})"
                )
            seen.add(key.value)
            size += _expanded(value, sizes, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_expanded(child, sizes, depth + 1) for child in node.value)
    if size > NODES_MAX:
        detail = f"more than {NODES_MAX} values once aliases are written out"
        raise Invalid(detail, errors=[FieldError(pointer="#", code="limit-exceeded", detail=detail)])
    sizes[id(node)] = size
    return size


def _check_values(value: object, pointer: str, depth: int, found: list[FieldError]) -> None:
    """Refuse what JSON cannot say: other types, NaN, keys that are not text, numbers beyond 64 bits."""
    if depth > DEPTH_MAX:
        raise TooDeep(f"nested more than {DEPTH_MAX} levels deep")
    if len(found) >= ERRORS_MAX:
        return
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                found.append(
                    FieldError(pointer=pointer, code="wrong-type", detail=f"the key {key!r:.64} must be text: quote it")
                )
            else:
                _check_values(child, f"{pointer}/{_token(key)}", depth + 1, found)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _check_values(child, f"{pointer}/{index}", depth + 1, found)
    elif isinstance(value, str):
        if "\x00" in value or (not value.isascii() and not _encodable(value)):
            found.append(FieldError(pointer=pointer, code="invalid-character", detail="NUL or half a surrogate pair"))
    elif isinstance(value, bool) or value is None:
        pass
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            found.append(FieldError(pointer=pointer, code="out-of-range", detail="must fit in 64 bits"))
    elif isinstance(value, float):
        if not math.isfinite(value):
            found.append(FieldError(pointer=pointer, code="out-of-range", detail="must be a finite number"))
    else:
        found.append(FieldError(pointer=pointer, code="wrong-type", detail=f"JSON has no {type(value).__name__}"))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _token(key: str) -> str:
    return key[:64].replace("~", "~0").replace("/", "~1")


def _all_errors(data: object) -> list[FieldError]:
    """Convert piece by piece, since a conversion stops at the first error: one error per stage, parameter and field."""
    found: list[FieldError] = []
    if not isinstance(data, dict):
        return [
            FieldError(pointer="#", code="wrong-type", detail="a definition is an object with `metadata` and `spec`")
        ]
    body = data.get("spec")
    if isinstance(body, dict):
        stages = body.get("stages")
        if isinstance(stages, list):
            for index, stage in enumerate(stages):
                _try(stage, Stage, f"#/spec/stages/{index}", found)
            body = body | {"stages": []}
        params = body.get("params")
        if isinstance(params, dict):
            for name, param in params.items():
                _try(param, Param, f"#/spec/params/{_token(name)}", found)
            body = body | {"params": {}}
        _try(body, Body, "#/spec", found)
        data = data | {"spec": {"stages": []}}
    if "metadata" in data:
        _try(data["metadata"], Metadata, "#/metadata", found)
        data = data | {"metadata": {"name": "-"}}
    _try(data, PipelineSpec, "#", found)
    return found


def _try(data: object, wanted: type, pointer: str, found: list[FieldError]) -> None:
    try:
        msgspec.convert(data, wanted)
    except msgspec.ValidationError as error:
        found.append(_field_error(pointer, error))


def _field_error(pointer: str, error: msgspec.ValidationError) -> FieldError:
    text, _, path = str(error).partition(" - at `")
    for name, index in _STEP.findall(path.rstrip("`")):
        pointer += "/" + (name or index)
    if "unknown field" in text:
        code = "unknown-field"
    elif "missing required field" in text:
        code = "missing-field"
    elif "Invalid enum value" in text:
        code = "out-of-range"
    else:
        code = "wrong-type"
    return FieldError(pointer=pointer, code=code, detail=text)
