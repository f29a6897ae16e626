"""Definitions from YAML and JSON. Both give the same `PipelineSpec`; what it means is checked by `validate.py`."""

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn, TypeVar

import msgspec
import yaml
from msgspec.structs import replace

from mcp_control.kernel.errors import DuplicateKey, FieldError, Invalid, MalformedJson, PayloadTooLarge, TooDeep
from mcp_control.kernel.shapes import field_errors
from mcp_control.pipelines.definition_model import Body, Metadata, PipelineSpec, Stage
from mcp_control.pipelines.input_model import Param

T = TypeVar("T")
TEXT_MAX: Final = 1 << 20
_LARGE: Final = 1 << 16
DEPTH_MAX: Final = 48  # a payload may have 32 levels, and `spec.stages[0].with` stands around it
NODES_MAX: Final = 500_000
ERRORS_MAX: Final = 50
_decode: Final = msgspec.json.Decoder(PipelineSpec).decode


# YAML reduced to what JSON can say: dates stay text.
_RESOLVERS: Final = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def from_yaml(text: str | bytes) -> PipelineSpec:
    """Read a definition written in YAML.

    Raises:
        PayloadTooLarge, TooDeep, DuplicateKey, Invalid: what `parse_yaml` raises.
        Invalid: it is no definition; all places are named.
    """
    return from_data(parse_yaml(text))


def parse_yaml(text: str | bytes) -> object:
    """Return what a YAML text says.

    Raises:
        PayloadTooLarge: the text is larger than 1 MiB.
        Invalid: it is not YAML, or grows beyond bounds by its aliases.
        TooDeep, DuplicateKey: as for JSON.
    """
    _check_size(text)
    try:
        with no_collections(text):
            return _parsed(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not readable as YAML"
        detail = f"malformed YAML{where}: {what}"
        found = FieldError(pointer="#", code="malformed-yaml", detail=detail, **_place(mark))
        raise Invalid(detail, errors=[found]) from error
    except RecursionError as error:
        raise TooDeep from error


def _parsed(text: str | bytes) -> object:
    _check_depth(text)
    node = composed(text)
    if node is None:
        raise Invalid("the document is empty", errors=[FieldError(pointer="#", code="wrong-type", detail="empty")])
    _expanded(node, {}, 0)
    loader = loader_of("")
    try:
        data: object = loader.construct_document(node)
    finally:
        loader.dispose()
    return data


def composed(text: str | bytes) -> yaml.Node | None:
    """Return a text as a tree of YAML nodes, with lines and columns; None for an empty one. Raises yaml.YAMLError and the like."""
    loader = loader_of(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


@contextmanager
def no_collections(text: str | bytes) -> Iterator[None]:
    """Hold garbage collection off while a large text becomes a million objects: a collection would stop all threads for long.

    What is made has no cycles and goes by itself. Two at once do no harm: the first that ends lets collections go on.
    """
    if len(text) < _LARGE or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def from_json(text: str | bytes) -> PipelineSpec:
    """Read a definition written in JSON.

    Raises:
        PayloadTooLarge, MalformedJson, TooDeep, DuplicateKey: what `parse_json` raises.
        Invalid: it is no definition; all places are named.
    """
    return from_data(parse_json(text))


def parse_json(text: str | bytes) -> object:
    """Return what a JSON text says. Raises PayloadTooLarge, MalformedJson, TooDeep, DuplicateKey."""
    _check_size(text)
    try:
        data: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise TooDeep from error
    except ValueError as error:
        raise MalformedJson(f"malformed JSON: {error}") from error
    return data


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
            found = field_errors(data, PipelineSpec, error)
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


def loader_of(text: str | bytes) -> yaml.SafeLoader | yaml.CSafeLoader:
    """Return what reads a text as YAML without anything that JSON cannot say. Dispose of it after use."""
    loader = yaml.CSafeLoader(text) if yaml.__with_libyaml__ else yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = _RESOLVERS
    return loader


def _place(mark: yaml.Mark | None) -> dict[str, int]:
    return {} if mark is None else {"line": mark.line + 1, "column": mark.column + 1}


def _check_depth(text: str | bytes) -> None:
    """Refuse deep nesting before anything recurses over it: the composer in C would overflow its stack."""
    loader = loader_of(text)
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
                detail = f"the key {key.value[:64]!r} stands twice in one mapping (line {key.start_mark.line + 1})"
                found = FieldError(pointer="#", code="duplicate-key", detail=detail, **_place(key.start_mark))
                raise DuplicateKey(detail, errors=[found])
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


def readable(data: object) -> tuple[PipelineSpec, frozenset[int], bool]:
    """Return what can be read of a definition that has faults, to look for further faults in it.

    Returns:
        The definition with stand-ins for what is wrong, the places of stages that are stand-ins, and whether ids and needs of all
        stages could be read.
    """
    whole = data if isinstance(data, dict) else {}
    given = whole.get("spec")
    body = given if isinstance(given, dict) else {}
    params = body.get("params")
    stages = body.get("stages")
    read: list[Stage] = []
    broken: set[int] = set()
    sure = isinstance(stages, list)
    for place, stage in enumerate(stages if isinstance(stages, list) else ()):
        found = _converted(stage, Stage)
        if found is None:
            broken.add(place)
            parts = stage if isinstance(stage, dict) else {}
            name, needs = _converted(parts.get("id"), str), _converted(parts.get("needs", []), list[str])
            sure = sure and name is not None and needs is not None
            found = Stage(id=name or f"\0{place}", uses="-", needs=needs or [])
        read.append(found)
    known = {
        name: _converted(param, Param) or Param()
        for name, param in (params.items() if isinstance(params, dict) else ())
        if isinstance(name, str)
    }
    rest = _converted({**body, "stages": [], "params": {}}, Body) or Body(stages=[])
    spec = PipelineSpec(
        metadata=_converted(whole.get("metadata"), Metadata) or Metadata(name="-"),
        spec=replace(rest, stages=read, params=known),
    )
    return spec, frozenset(broken), sure


def _converted(data: object, wanted: type[T]) -> T | None:
    try:
        return msgspec.convert(data, wanted)
    except msgspec.ValidationError:
        return None
