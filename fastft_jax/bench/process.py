"""How long this process has lived."""

import os
import time


def process_age() -> float | None:
    """Seconds since the process was started, the interpreter's own start included; None where the kernel won't say."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22, starttime
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 2)
    except (OSError, AttributeError, ValueError):
        return None
