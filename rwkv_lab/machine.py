"""What this machine has to give: free memory and disk."""

import os
import shutil
from pathlib import Path


def disk_free(folder: Path) -> int:
    """Bytes this user may still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def memory_free() -> int:
    """Bytes of memory the machine can give without swapping; where the system does not say, all that it has."""
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
