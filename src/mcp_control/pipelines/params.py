"""Parameters of a run: checked against their declarations, defaults filled in, as JSON text. Pure."""

from collections.abc import Mapping
from typing import Final

import msgspec

from mcp_control.kernel.errors import FieldError, Invalid
from mcp_control.pipelines.input_model import Param

_SIZE_MAX: Final = 1 << 20
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "artifact": (str, dict),
}


def fits(value: object, param: Param) -> str:
    """Return why a value is none for this parameter; empty when it is one."""
    kinds = _KINDS[param.type]
    if isinstance(value, bool) and bool not in kinds:
        return f"must be of type {param.type}, got boolean"
    if not isinstance(value, kinds):
        return f"must be of type {param.type}"
    if param.choices and value not in param.choices:
        return f"must be one of {msgspec.json.encode(param.choices).decode():.200}"
    return ""


def resolve(declared: Mapping[str, Param], given: Mapping[str, msgspec.Raw]) -> dict[str, bytes]:
    """Return the value of every declared parameter as JSON text; what is neither given nor has a default is null.

    Raises:
        Invalid: an unknown or missing parameter, one of a wrong type, or more than 1 MiB in all; every one is named.
    """
    found: list[FieldError] = []
    values: dict[str, bytes] = {}
    for name in given:
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            found.append(_error(name, "unknown-field", f"there is no parameter `{name[:64]}`; known are {known:.200}"))
    for name, param in declared.items():
        raw = given.get(name)
        if raw is None:
            if param.default is msgspec.UNSET and param.required:
                found.append(_error(name, "missing-field", f"the parameter `{name}` must be given"))
            values[name] = b"null" if param.default is msgspec.UNSET else msgspec.json.encode(param.default)
            continue
        text = bytes(raw)
        try:
            value = msgspec.json.decode(text)
        except msgspec.DecodeError:
            found.append(_error(name, "wrong-type", f"the parameter `{name}` is not JSON"))
            continue
        wrong = "" if value is None and not param.required else fits(value, param)
        if wrong:
            found.append(
                _error(name, "wrong-type" if "type" in wrong else "out-of-range", f"the parameter `{name}` {wrong}")
            )
        values[name] = text
    if sum(map(len, values.values())) > _SIZE_MAX:
        found.append(
            FieldError(
                pointer="#/params",
                code="limit-exceeded",
                detail="parameters have at most 1 MiB in all; pass data as artifacts",
            )
        )
    if found:
        raise Invalid(found[0].detail, errors=found[:50])
    return values


def _error(name: str, code: str, detail: str) -> FieldError:
    token = name[:64].replace("~", "~0").replace("/", "~1")
    return FieldError(pointer=f"#/params/{token}", code=code, detail=detail)
