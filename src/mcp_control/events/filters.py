"""Which facts somebody wants."""

from collections.abc import Sequence
from typing import Final

import msgspec

from mcp_control.kernel.changes import Fact
from mcp_control.kernel.errors import field_error

_MAX_PATTERNS: Final = 50


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which facts: all conditions that are not None must hold.

    Attributes:
        types: exact types, or `noun.*`, or `*`; empty means all.
        subject: id of the thing.
        run: id of the run; the run's own facts count as well.
        tenant: whose.
    """

    types: tuple[str, ...] = ()
    subject: str | None = None
    run: str | None = None
    tenant: str | None = None

    def wants_type(self, type: str) -> bool:
        """Say whether facts of this type can match at all."""
        if not self.types:
            return True
        any_of_noun = type.partition(".")[0] + ".*"
        return any(pattern in (type, any_of_noun, "*") for pattern in self.types)

    def wants(self, fact: Fact) -> bool:
        """Say whether a fact of a wanted type matches."""
        return (
            (self.tenant is None or fact.tenant == self.tenant)
            and (self.subject is None or fact.subject == self.subject)
            and (self.run is None or self.run in (fact.run, fact.subject))
        )


def filter_of(
    types: Sequence[str] = (), subject: str | None = None, run: str | None = None, tenant: str | None = None
) -> Filter:
    """Return a checked filter. Raises Invalid for a pattern that is none, or too many of them."""
    if len(types) > _MAX_PATTERNS:
        raise field_error("#/types", "limit-exceeded", f"at most {_MAX_PATTERNS} types")
    for at, pattern in enumerate(types):
        noun, _, verb = pattern.partition(".")
        if pattern != "*" and not (_is_word(noun) and (verb == "*" or _is_word(verb))):
            raise field_error(f"#/types/{at}", "invalid-filter", "a type is `noun.verb`, `noun.*` or `*`")
    return Filter(types=tuple(types), subject=subject, run=run, tenant=tenant)


def _is_word(text: str) -> bool:
    return 0 < len(text) <= 64 and text.isascii() and text.replace("_", "").isalnum()
