"""Freed memory given back to the system: glibc keeps much of what a base's float weights took on their way to int8."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

PORTION = 2**26
"""Bytes of weights after which what they took is given back, while a base is loaded."""


@functools.cache
def _trimming() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where the C library is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def give_back() -> None:
    """Give the system all pages that nothing lies on any more."""
    trim = _trimming()
    if trim is not None:
        trim(0)


class Portions:
    """Counts bytes that pass, and gives memory back after every portion of them."""

    def __init__(self) -> None:
        self.passed = 0

    def passes(self, size: int) -> None:
        """So many bytes have passed."""
        self.passed += size
        if self.passed >= PORTION:
            self.passed = 0
            give_back()
