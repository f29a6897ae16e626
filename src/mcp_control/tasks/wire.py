"""The agent protocol, version 1: frames of JSON text over `/ws/agent`, and the same shapes over REST.

Every frame that takes one item takes many: each side sends what has gathered while its last frame was on its way
(architecture, section 4, "Natural batching").
"""

from typing import Final, Literal

import msgspec

from mcp_control.agents.model import AgentSpec, Beat
from mcp_control.tasks.ask_model import Answered, Ask
from mcp_control.tasks.budget_model import Spent
from mcp_control.tasks.model import NULL, Failure, LogLine

UNKNOWN_TYPE: Final = "unknown-type"
"""The code of a failure that says that an instance has no handler for a type of task."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A task given to an agent. Its lease token must come back with everything the agent reports on it.

    Attributes:
        fence: `generation.epoch`, for outside systems.
        deadline_at: wall milliseconds, None where there is none.
        budget: what is left of what is limited, by the names of a budget; None where it draws from no budget.
        slots: how many of the agent's slots it takes.
        answers: what people answered to questions of earlier attempts, by the keys of these.
    """

    task_id: str
    type: str
    attempt: int
    fence: str
    lease_token: str
    payload: msgspec.Raw
    max_attempts: int = 3
    timeout_ms: int | None = None
    deadline_at: int | None = None
    run_id: str | None = None
    stage: str | None = None
    item: int | None = None
    labels: dict[str, str] = {}
    budget: dict[str, float] | None = None
    traceparent: str | None = None
    slots: int = 1
    answers: dict[str, Answered] = {}


class Started(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """An attempt has begun."""

    task_id: str
    lease_token: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """How far an attempt is: 0 to 1, with a sentence."""

    task_id: str
    lease_token: str
    fraction: float
    message: str = ""


class Logged(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """Lines an attempt logged."""

    task_id: str
    lease_token: str
    lines: list[LogLine]


class Used(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """What an attempt has used so far, in all."""

    task_id: str
    lease_token: str
    spent: Spent


class Done(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """An attempt has ended. `released` hands the task back unfinished (drain); `failure` goes with `failed`, `ask` with `asked`: a person
    must answer first."""

    task_id: str
    lease_token: str
    outcome: Literal["completed", "failed", "cancelled", "released", "asked"]
    result: msgspec.Raw = msgspec.field(default_factory=lambda: NULL)
    failure: Failure | None = None
    ask: Ask | None = None


class Hello(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="op",
    tag="hello",
):
    """First frame of an agent: what it is, and the instance and tasks it goes on with after a reconnect.

    `instance_id` is None for a new process; else the instance resumes with its leases when they still live.
    """

    protocol: int = 1
    agent: AgentSpec
    instance_id: str | None = None
    software: str = ""
    beat: Beat = Beat()


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="beat"):
    """The session lives on."""

    beat: Beat


class Report(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="op",
    tag="report",
):
    """What happened since the last report; answered by an `Ack` with the same id once it is durable."""

    id: int
    started: list[Started] = []
    progress: list[Progress] = []
    logs: list[Logged] = []
    used: list[Used] = []
    done: list[Done] = []


class Bye(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="op", tag="bye"
):
    """`drain`: send nothing new, I finish what I have. `leave`: I have nothing any more, end my session."""

    step: Literal["drain", "leave"] = "drain"


class Renew(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op", tag="renew"):
    """A fresh credential for the open socket."""

    credential: str


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="welcome"):
    """The session is open. Held leases not named in `resumed` are over: stop that work."""

    protocol: int
    agent_id: str
    instance_id: str
    lease_ms: int
    beat_ms: int
    resumed: list[str] = []


class Tasks(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="tasks"):
    """Work."""

    tasks: list[Assignment]


class Refusal(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something in a report was not accepted: which task, the problem's code and detail."""

    task_id: str
    code: str
    detail: str


class Ack(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="op", tag="ack"):
    """A report is durable, but for what was refused. `retry` means: nothing of it is known to be durable, send it again."""

    id: int
    refused: list[Refusal] = []
    retry: bool = False


class BeatAck(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="op", tag="beat_ack"):
    """The session's lease is renewed for `lease_ms` from the moment the heartbeat was sent. Tasks in `gone` are no longer this instance's;
    those in `cancel` are to be stopped."""

    lease_ms: int
    gone: list[str] = []
    cancel: list[str] = []
    drain: bool = False


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="cancel"):
    """Stop working on these tasks and report `cancelled`, or finish if that is nearer."""

    task_ids: list[str]
    reason: str = ""


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="order"):
    """The server wants something of the whole agent: `drain` (finish and take nothing new), `resume`, `retire` (finish and end)."""

    order: Literal["drain", "resume", "retire"]
    note: str = ""


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", tag="problem"):
    """A frame was not understood or not allowed: the problem document's code and detail."""

    code: str
    detail: str


AgentFrame = Hello | Heartbeat | Report | Bye | Renew
ServerFrame = Welcome | Tasks | Ack | BeatAck | Cancel | Order | Trouble

encode_frame = msgspec.json.Encoder().encode
decode_agent_frame = msgspec.json.Decoder(AgentFrame).decode
decode_server_frame = msgspec.json.Decoder(ServerFrame).decode
