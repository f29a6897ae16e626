"""How a command ends: exit codes, and errors that say what happened, why, and what to do next."""

import sys
from typing import Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
DENIED: Final = 4
CONFLICT: Final = 5
UNREACHABLE: Final = 6
TIMED_OUT: Final = 7
ENDED_BADLY: Final = 8
INTERRUPTED: Final = 130

MEANINGS: Final = {
    OK: "done",
    FAILED: "error",
    USAGE: "the command or its input is wrong",
    NOT_FOUND: "there is no such thing",
    DENIED: "not logged in, or not allowed",
    CONFLICT: "it does not fit the state the thing is in",
    UNREACHABLE: "the server cannot be reached, or asks for patience",
    TIMED_OUT: "the wait ended before the thing did",
    ENDED_BADLY: "what was waited for failed",
    INTERRUPTED: "interrupted with Ctrl-C",
}


class CliError(Exception):
    """Ends the command.

    Args:
        what: what happened and why, in a sentence.
        code: the exit code.
        hint: what to do next, often a command.
    """

    def __init__(self, what: str, code: int = FAILED, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.code = code
        self.hint = hint


def told(error: Exception) -> CliError | None:
    """Return what to tell people about an error of the SDK; None for one that is ours to repair."""
    from mcp_control.sdk import errors as sdk
    from mcp_control.sdk.runtime.links import LinkRefused

    match error:
        case CliError():
            return error
        case sdk.ApiProblem():
            return _problem(error)
        case sdk.Unreachable():
            return CliError(
                str(error), UNREACHABLE, "is the server running? `mcpctl up` starts one, `mcpctl doctor` looks"
            )
        case sdk.WaitTimeout():
            return CliError(str(error), TIMED_OUT, "it goes on; wait again or look at it with `get`")
        case sdk.TaskFailed() | sdk.RunFailed():
            return CliError(str(error), ENDED_BADLY)
        case LinkRefused():
            denied = error.status in (401, 403)
            hint = "`mcpctl agents enrol` makes a token for MCP_CONTROL_ENROLMENT_TOKEN" if denied else ""
            return CliError(str(error), DENIED if denied else FAILED, hint)
        case sdk.SdkError():
            return CliError(str(error))
        case _:
            return None


def _problem(problem: object) -> CliError:
    from mcp_control.sdk import errors as sdk

    assert isinstance(problem, sdk.ApiProblem)
    places = "".join(
        f"\n  {place.get('pointer', '')}: {place.get('detail', '')} [{place.get('code', '')}]"
        for place in problem.errors
    )
    request = f" (request {problem.request_id})" if problem.request_id else ""
    what = f"{problem.detail} [{problem.code}]{request}{places}"
    match problem:
        case sdk.AccessDenied():
            hint = "log in with `mcpctl login`, or set MCP_CONTROL_TOKEN" if problem.status == 401 else ""
            return CliError(what, DENIED, hint)
        case sdk.Missing():
            return CliError(what, NOT_FOUND, "`ls` lists what there is")
        case sdk.Conflicting():
            return CliError(what, CONFLICT)
        case sdk.InvalidRequest():
            return CliError(what, CONFLICT if problem.code == "idempotency-mismatch" else USAGE)
        case sdk.NotNow():
            return CliError(what, UNREACHABLE, "try again in a moment")
        case _:
            return CliError(what)


def tell(error: CliError) -> None:
    """Write an error for people to standard error."""
    sys.stderr.write(f"mcpctl: {error.what}\n")
    if error.hint:
        sys.stderr.write(f"  next: {error.hint}\n")
