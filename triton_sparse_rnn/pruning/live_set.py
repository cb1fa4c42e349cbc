"""A set that keeps nothing alive and may be read while other threads change it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class LiveSet(Generic[T]):
    """Those of its members that somebody else holds."""

    def __init__(self) -> None:
        self._members: weakref.WeakSet[T] = weakref.WeakSet()
        self._lock = threading.RLock()  # reentrant: the garbage collector may come in between

    def add(self, member: T) -> None:
        with self._lock:
            self._members.add(member)

    def discard(self, member: T) -> None:
        with self._lock:
            self._members.discard(member)

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter(list(self._members))
