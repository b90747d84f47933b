"""Giving memory back to the system."""

import contextlib
import ctypes
import sys


def trim() -> None:
    """Returns what the heap no longer uses, where the C library can: parsing a tokenizer leaves 30 MB of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such call
            ctypes.CDLL(None).malloc_trim(0)
