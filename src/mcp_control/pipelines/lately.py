"""What is asked for as soon as a run has ended: its parameters and what it gave, kept for a while where they are small."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import msgspec

from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.model import Run

_BYTES_MAX: Final = 8 << 10
_RUNS_MAX: Final = 500


class _Ended(msgspec.Struct, frozen=True, gc=False):
    version: int
    params: Mapping[str, Raw]
    result: bytes | None


class Lately:
    """Cold parts of the runs that ended last; they belong to one version of the run, so that they cannot be out of date."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Ended] = OrderedDict()

    def note(self, run: Run, params: Mapping[str, Raw] | None, result: Raw | None) -> None:
        """Keep what belongs to a run that has just ended."""
        size = 0 if result is None else len(memoryview(result))
        if params is None or size + sum([len(memoryview(text)) for text in params.values()]) > _BYTES_MAX:
            return
        self._kept[run.id] = _Ended(run.version, params, None if result is None else bytes(result))
        if len(self._kept) > _RUNS_MAX:
            self._kept.popitem(last=False)

    def of(self, run: Run) -> tuple[Mapping[str, Raw] | None, bytes | None]:
        """Return the parameters of a run and what it gave; None and None where they are not kept."""
        ended = self._kept.get(run.id)
        return (None, None) if ended is None or ended.version != run.version else (ended.params, ended.result)
