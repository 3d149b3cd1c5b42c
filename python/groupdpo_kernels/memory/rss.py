"""Resident memory of this process: now, at its peak, and under a limit. Linux; elsewhere the peak since it began.

What no hook in an allocator sees, the kernel does: buffers of C++ code and of the matrix library. So that resident
memory is memory in use, `return_freed_memory` has malloc give freed blocks back at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path


def resident(kind: str) -> int:
    """Bytes: "VmRSS" is now, "VmHWM" the most since `forget_peak`."""
    try:
        return _status(kind)
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def forget_peak() -> None:
    """From here on VmHWM counts anew."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Has glibc map blocks above 64 KiB one by one, so that what is freed is gone, and return what it holds."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, 2**16)
        libc.malloc_trim(0)


def limit_memory(more: int) -> None:
    """No more than this many bytes beyond what is mapped now: what asks for more fails, as on a smaller machine."""
    import resource

    most = _status("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
