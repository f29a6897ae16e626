"""How wide an adaptive run or fan-out is: additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP does. Pure.

The width doubles per round of work until the first attempt fails, then grows by one per round, and halves when the recent share of failed
attempts is above a tenth. It does not grow while it is not used up, and never beyond the free slots of agents.
"""

from typing import Final

from mcp_control.pipelines.model import Window

ERRORS_MAX: Final = 0.1
_WEIGHT: Final = 0.1
WIDTH_MAX: Final = 10_000.0


def after(window: Window, *, failed: int, completed: bool, open: int) -> Window:
    """Return the window after the end of a piece of work.

    Args:
        failed: attempts at it that failed.
        completed: whether it ended well.
        open: how many pieces were under way, this one included.
    """
    errors = window.errors
    for _ in range(min(failed, 100)):
        errors += (1.0 - errors) * _WEIGHT
    if completed:
        errors -= errors * _WEIGHT
    if failed and errors >= ERRORS_MAX:
        # What failed at the old width is not held against the new one a second time.
        return Window(max(1.0, window.width / 2), errors / 2)
    if not completed or open < int(window.width):
        return Window(window.width, errors)
    more = 1.0 if errors == 0.0 else 1.0 / window.width
    return Window(min(WIDTH_MAX, window.width + more), errors)


def allowed(window: Window, *, open: int, free: int | None, top: int | None) -> int:
    """Return how many pieces may be under way now, at least one.

    Args:
        open: how many are; free: slots of agents that could take more, None where that is not known.
        top: never more than this.
    """
    width = int(window.width)
    if free is not None:
        width = min(width, open + free)
    if top is not None:
        width = min(width, top)
    return max(1, width)
