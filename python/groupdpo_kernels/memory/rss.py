"""Reads and limits the resident memory of this process, now and at its peak. Outside Linux only the peak is known.

The kernel also counts what no hook in an allocator sees: the buffers of C++ code and of BLAS. `return_freed_memory`
makes malloc give freed blocks back at once, so that resident memory is memory in use.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path


def resident(kind: str) -> int:
    """Bytes of resident memory: "VmRSS" now, "VmHWM" at the peak since `forget_peak`."""
    try:
        return _status(kind)
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def forget_peak() -> None:
    """Resets the peak VmHWM to the present memory."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Makes glibc map blocks above 64 KiB one by one, so that freeing returns them, and return what it holds now."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**16)
        libc.malloc_trim(0)


def limit_memory(more: int) -> None:
    """Limits the process to this many bytes beyond what is mapped now: allocations fail as on a smaller machine."""
    import resource

    most = _status("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
