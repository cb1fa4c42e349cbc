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
        self._members: tuple[weakref.ref[T], ...] = ()  # replaced as a whole, so readers need no lock
        self._lock = threading.RLock()  # reentrant: the garbage collector may come in between

    def add(self, member: T) -> None:
        with self._lock:
            self._members = (*self._without(member), weakref.ref(member))

    def discard(self, member: T) -> None:
        with self._lock:
            self._members = self._without(member)

    def __iter__(self) -> Iterator[T]:
        return iter([member for each in self._members if (member := each()) is not None])

    def _without(self, member: T) -> tuple[weakref.ref[T], ...]:
        return tuple(each for each in self._members if each() not in (None, member))
