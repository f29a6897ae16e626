"""When a failed attempt is tried again."""

from mcp_control.tasks.model import Failure, RetryPolicy


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
