"""Resource figures of this process for heartbeats, from the kernel, in a few microseconds."""

import os
import resource
import time


class Figures:
    """CPU since the last look, resident memory, load of the machine."""

    __slots__ = ("_at", "_cpu")

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._cpu = _cpu_seconds()

    def cpu_percent(self) -> float:
        """Return CPU use of this process and its ended children since the last call; 100 is one core."""
        now, cpu = time.monotonic(), _cpu_seconds()
        elapsed, used = now - self._at, cpu - self._cpu
        self._at, self._cpu = now, cpu
        return round(100 * used / elapsed, 1) if elapsed > 0 else 0.0

    def memory_mb(self) -> float:
        """Return resident memory in mebibytes; where there is no /proc, its peak."""
        try:
            with open("/proc/self/statm", "rb") as file:
                pages = int(file.read().split()[1])
        except OSError:
            return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        return round(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), 1)

    def load(self) -> float:
        """Return the machine's load over one minute."""
        return round(os.getloadavg()[0], 2)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def boottime() -> float:
    """Return seconds on a clock that also runs while the machine sleeps, as leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
