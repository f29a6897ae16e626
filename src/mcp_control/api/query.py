"""Query strings: into Structs, strictly. A parameter nobody knows is an error, since a misspelt filter would answer too much."""

from typing import Annotated, Final, Generic, TypeVar
from urllib.parse import parse_qsl

import msgspec

from mcp_control.kernel.errors import FieldError, Invalid, TokenInUrl, UnknownParameter
from mcp_control.kernel.shapes import field_errors

T = TypeVar("T")
Limit = Annotated[int, msgspec.Meta(ge=1, le=500)]
WaitSeconds = Annotated[float, msgspec.Meta(ge=0, le=60)]
# Where a credential in the URL would stay readable in logs and histories.
_SECRET: Final = frozenset(
    {"token", "access_token", "api_key", "apikey", "password", "authorization", "jwt", "credential", "refresh_token"}
)


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The route takes no parameters."""


class PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A page of a list."""

    limit: Limit = 50
    cursor: str | None = None


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Wait up to so many seconds for the thing to become final."""

    wait: WaitSeconds = 0.0


class Query(Generic[T]):
    """The parameters of a route. Fields of list type may repeat."""

    __slots__ = ("_empty", "_lists", "_names", "type")

    def __init__(self, type: type[T]) -> None:
        self.type = type
        fields = msgspec.structs.fields(type)  # type: ignore[arg-type]  # T is a Struct; msgspec has no bound to say so
        self._names = {field.encode_name: field for field in fields}
        self._lists = {field.encode_name for field in fields if getattr(field.type, "__origin__", None) is list}
        self._empty: T = type()

    def decode(self, query_string: bytes) -> T:
        """Return the parameters.

        Raises:
            TokenInUrl: a parameter that carries a credential.
            UnknownParameter: 400, named.
            Invalid: 422, a value of the wrong type or out of range.
        """
        if not query_string:
            return self._empty
        values: dict[str, object] = {}
        for name, value in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=100):
            if name.lower() in _SECRET:
                raise TokenInUrl("send credentials in the Authorization header")
            if name not in self._names:
                raise UnknownParameter("no such parameter", parameter=name[:64], known=sorted(self._names))
            if name in self._lists:
                known = values.setdefault(name, [])
                assert isinstance(known, list)
                known.append(value)
            elif name in values:
                raise UnknownParameter("the parameter may be given once", parameter=name)
            else:
                values[name] = value
        for name, given in values.items():
            if "\0" in str(given):
                raise Invalid(
                    "NUL characters are not allowed",
                    errors=(FieldError(pointer=f"#/{name}", code="invalid-character", detail="NUL"),),
                )
        try:
            return msgspec.convert(values, self.type, strict=False)
        except msgspec.ValidationError as error:
            errors = [found for name, given in values.items() for found in self._faults(name, given)]
            raise Invalid(str(error), errors=errors or field_errors({}, msgspec.Raw, error)) from error

    def _faults(self, name: str, value: object) -> list[FieldError]:
        try:
            msgspec.convert(value, self._names[name].type, strict=False)
        except msgspec.ValidationError as error:
            found = field_errors(None, msgspec.Raw, error)[0]
            return [msgspec.structs.replace(found, pointer=f"#/{name}")]
        return []


def refuse_credentials(query_string: bytes) -> None:
    """Raise TokenInUrl where the URL carries a credential, known parameter or not."""
    lowered = query_string.lower()
    if any(name.encode() in lowered for name in _SECRET):
        for name, _ in parse_qsl(query_string.decode("latin-1"), keep_blank_values=True):
            if name.lower() in _SECRET:
                raise TokenInUrl("send credentials in the Authorization header")
