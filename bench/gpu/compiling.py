"""How long Triton compiles: it is told beside times, and is in none of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton import knobs


@contextlib.contextmanager
def compile_seconds() -> Iterator[list[float]]:
    """Give a list that gets the seconds of each kernel that is compiled meanwhile, and not found in the cache."""
    seconds: list[float] = []
    compilation: Any = knobs.compilation
    before = compilation.listener

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            seconds.append(times.total / 1e6)

    compilation.listener = listen
    try:
        yield seconds
    finally:
        compilation.listener = before
