"""Freed memory stays with the process, for the next batch.

glibc hands large blocks back to the kernel as soon as they are freed, and gets them anew, page by page, for the next
batch. On CPUs that costs a few per cent of the training of a small model, and up to half of a test in large batches
(docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os

KEPT_BYTES = 1 << 29
"""Blocks below this size are kept, and so much free memory at the end of the heap."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Make it so, unless the environment configures the allocator or the C library is not glibc."""
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    if not mallopt(_MMAP_THRESHOLD, KEPT_BYTES):  # older versions accept no more than 32 MiB
        mallopt(_MMAP_THRESHOLD, 1 << 25)
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def return_freed_memory() -> None:
    """Hand back what is free now: after something large that will not be needed again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
