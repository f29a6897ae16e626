"""The shapes `decide` works with: what is known of a run, and what it decided."""

from collections.abc import Mapping

import msgspec

from mcp_control.pipelines.expressions import Raw
from mcp_control.pipelines.model import Run, StageRun
from mcp_control.pipelines.plan import PlannedStage


class Missing(Exception):
    """Something needed is stored and not in hand: load it and decide again."""

    def __init__(
        self, *, params: bool = False, output: str | None = None, results: int | None = None, signal: str | None = None
    ) -> None:
        """Name it: the parameters, the output of a stage by id, the item results of a stage by place, or the signals of a name."""
        super().__init__()
        self.params = params
        self.output = output
        self.results = results
        self.signal = signal


class Material:
    """What is known beside the run document.

    Attributes:
        params: by name; outputs: of stages; results: of fan-out items by stage id (of one that may fail, how it failed).
        lists: what fan-outs of bounded width go over, by stage id, so that it is not computed for each item.
        signals: bodies by id.
        free: slots of agents that could take one more task, by stage id; empty where that is not known.
    """

    __slots__ = ("free", "lists", "outputs", "params", "results", "signals")

    def __init__(self, params: Mapping[str, Raw] | None = None) -> None:
        self.params = params
        self.outputs: dict[str, Raw] = {}
        self.results: dict[str, dict[int, Raw]] = {}
        self.lists: dict[str, list[msgspec.Raw]] = {}
        self.signals: dict[str, Raw] = {}
        self.free: Mapping[str, int] = {}


class Start(msgspec.Struct, frozen=True):
    """A task to create. `item` is None for the task of a plain stage, -1 for the combine task; `priority` None is that of the stage."""

    stage: PlannedStage
    item: int | None
    round: int
    payload: bytes
    priority: int | None = None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What follows. `run` is the very object that was given when nothing changed.

    Attributes:
        moved: stages whose state changed, as they are now; progressed: stages that counted a task and go on.
        asked: title and message, as JSON, of what stages ask people from now on, by place.
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
    moved: list[StageRun] = []
    progressed: list[StageRun] = []
