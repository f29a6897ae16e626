"""The shapes `decide` works with: what is known of a run, and what it decided."""

from collections.abc import Mapping, Sequence

import msgspec

from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.model import Run, StageRun
from mcp_control.pipelines.plan import PlannedStage


class Missing(Exception):
    """Something needed is stored and not in hand: load it and decide again."""

    def __init__(
        self,
        *,
        params: bool = False,
        output: str | None = None,
        results: int | None = None,
        signal: str | None = None,
        kept: Sequence[str] = (),
    ) -> None:
        """Name it: parameters, the output of a stage by id, item results of a stage by place, signals of a name, kept results by key."""
        super().__init__()
        self.params = params
        self.output = output
        self.results = results
        self.signal = signal
        self.kept = kept


class Material:
    """What is known beside the run document.

    Attributes:
        params: by name; outputs: of stages; results: of fan-out items by stage id (of one that may fail, how it failed).
        lists: what fan-outs of bounded width go over, by stage id, so that it is not computed for each item.
        signals: bodies by id.
        kept: results of earlier runs by key, None where there is none; codes: the versions of its code that agents declare, by stage id.
        free: slots of agents that could take one more task, by stage id; empty where that is not known.
    """

    __slots__ = ("codes", "free", "kept", "lists", "outputs", "params", "results", "signals")

    def __init__(self, params: Mapping[str, Raw] | None = None) -> None:
        self.params = params
        self.outputs: dict[str, Raw] = {}
        self.results: dict[str, dict[int, Raw]] = {}
        self.lists: dict[str, list[msgspec.Raw]] = {}
        self.signals: dict[str, Raw] = {}
        self.free: Mapping[str, int] = {}
        self.kept: dict[str, Raw | None] = {}
        self.codes: Mapping[str, tuple[str, ...]] = {}


class Start(msgspec.Struct, frozen=True, gc=False):
    """A task to create. `item` is None for the task of a plain stage, -1 for the combine task; `priority` None is that of the stage."""

    stage: PlannedStage
    item: int | None
    round: int
    payload: bytes
    priority: int | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What follows.

    Attributes:
        run: at its next version where something follows; else the very object that was given.
        moved: stages whose state changed, as they are now; progressed: stages that counted a task and go on.
        asked: title and message, as JSON, of what stages ask people from now on, by place.
        hits: results of items that were taken from earlier runs, to be kept with the run; used: the keys of all that were taken.
        result: what the run gives, when it has just completed.
        outputs: outputs of stages that ended, to be kept; results: results of fan-out items counted.
    """

    run: Run
    start: list[Start] = []
    cancel: list[str] = []
    asked: dict[int, bytes] = {}
    outputs: dict[str, Raw] = {}
    result: Raw | None = None
    results: dict[str, dict[int, Raw]] = {}
    hits: dict[str, dict[int, Raw]] = {}
    used: list[str] = []
    moved: list[StageRun] = []
    progressed: list[StageRun] = []
