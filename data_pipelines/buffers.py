"""Recycling of large host buffers: fresh pages cost as much as reading the patches that fill them."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np


class BufferPool:
    """Hands out arrays of one shape; the memory is reused once nothing refers to an array or to a view of it.

    Reuse follows Python references, exactly as freeing does, so whoever keeps a batch (a consumer, or a JAX array that
    shares the memory) keeps its contents. No more buffers exist than were ever referenced at one time. Thread-safe.

    Args:
      shape: shape of the arrays.
      dtype: their dtype.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype | type):
        self._shape, self._dtype = shape, np.dtype(dtype)
        # A deque needs no lock; a lock could be re-entered by a finaliser that runs while it is held.
        self._free: collections.deque[np.ndarray] = collections.deque()

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._shape, self._dtype)

    def take(self) -> np.ndarray:
        """An array with arbitrary contents."""
        try:
            storage = self._free.pop()
        except IndexError:
            storage = np.empty(self._shape, self._dtype)
        return np.asarray(_Lease(storage, self._free))


class _Lease:
    """Owner of the arrays cut from one storage. Not an ndarray, so that NumPy keeps it as the base of every view."""

    def __init__(self, storage: np.ndarray, free: collections.deque[np.ndarray]):
        self._storage, self._free = storage, free
        self.__array_interface__ = storage.__array_interface__

    def __del__(self):
        self._free.append(self._storage)
