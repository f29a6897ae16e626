"""When a failed attempt is tried again."""

from typing import Final

from mcp_control.tasks.model import Failure, RetryPolicy

LATEST_SECONDS: Final = 86_400.0
_SPREAD: Final = 0.25


def backoff_ms(policy: RetryPolicy, failures: int, chance: float) -> int:
    """Return how long to wait before the next attempt, in milliseconds: exponential with full jitter.

    Args:
        failures: attempts that have failed so far, 1 or more.
        chance: a random number in [0, 1).

    Source: "Exponential Backoff and Jitter", AWS Architecture Blog, 2015; full jitter spreads a herd best.
    """
    # The exponent is bounded so that a large attempt count cannot overflow the float.
    ceiling = min(policy.longest_seconds, policy.first_seconds * policy.factor ** min(failures - 1, 64))
    return round(ceiling * chance * 1000)


def may_retry(policy: RetryPolicy, failures: int, failure: Failure) -> bool:
    """Say whether another attempt follows: only temporary errors, and only while attempts are left."""
    return failure.error_class == "temporary" and failures < policy.max_attempts


def postponed(policy: RetryPolicy, failure: Failure) -> bool:
    """Say whether an attempt is to be made later at no cost; not where a task may be started only once (promise G5)."""
    return failure.retry_after is not None and failure.error_class == "temporary" and policy.max_attempts > 1


def later_ms(failure: Failure, chance: float) -> int:
    """Return how long to wait at the wish of a failure, in milliseconds: never less, at most a quarter more, so that a herd spreads.

    Args:
        chance: a random number in [0, 1).
    """
    seconds = min(max(failure.retry_after or 0.0, 0.0), LATEST_SECONDS)
    return round(seconds * (1 + _SPREAD * chance) * 1000)
