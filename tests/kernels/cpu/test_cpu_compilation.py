"""Numba's cache as these kernels use it: what is found there, what is not, and what damage does to it."""

import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core import caching, config, event

from triton_sparse_rnn.kernels.cpu import compilation
from triton_sparse_rnn.kernels.cpu.pack import PackFields, PackFormat

LAYOUT = PackFormat(tile_rows=1, quad=1, quantized=True, offset=11)
OTHER = LAYOUT._replace(offset=12)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty folder of its own."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled_anew(layout):
    """The kernel as a process makes it that has not had it yet."""
    return compilation._compiled.__wrapped__(layout)


@contextlib.contextmanager
def passes():
    """The list that holds what the compiler does meanwhile."""
    with event.install_recorder("numba:run_pass") as recorder:
        yield recorder.buffer


def offset_of(kernel):
    """What the kernel adds to a quantised zero, by which it is known."""
    source, target, scale = torch.zeros(1), torch.zeros(1, dtype=torch.int8), torch.zeros(1)
    addresses = source.data_ptr(), 4, target.data_ptr(), scale.data_ptr()
    words = np.array(PackFields(1, 1, *addresses), dtype=np.int64)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel.address)(words.ctypes.data, 0, 1)
    return int(target)


def files(cache, ending):
    return sorted(cache.rglob(f"*.{ending}"))


def test_compiled_once_and_found_again(cache):
    with passes() as first:
        kernel = compiled_anew(LAYOUT)
    with passes() as second:
        again = compiled_anew(LAYOUT)
    assert first
    assert not second
    assert offset_of(kernel) == offset_of(again) == 11
    assert len(files(cache, "nbc")) == 1


def test_kernels_are_told_apart():
    for _ in range(2):
        assert offset_of(compiled_anew(LAYOUT)) == 11
        assert offset_of(compiled_anew(OTHER)) == 12


def test_changed_source_is_compiled_anew(monkeypatch):
    compiled_anew(LAYOUT)
    monkeypatch.setattr(compilation, "fingerprint", lambda: "of other source")
    with passes() as anew:
        assert offset_of(compiled_anew(LAYOUT)) == 11
    assert anew


def test_every_line_of_every_file_is_in_the_fingerprint(monkeypatch, tmp_path):
    folder = Path(compilation.__file__).parent
    sources = sorted(folder.rglob("*.py"))
    copies = [tmp_path / source.relative_to(folder) for source in sources]
    for source, copy in zip(sources, copies, strict=True):
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(source.read_bytes())
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "compilation.py"))
    fingerprints = {compilation.fingerprint.__wrapped__()}
    assert fingerprints == {compilation.fingerprint()}
    for source, copy in zip(sources, copies, strict=True):
        copy.write_bytes(source.read_bytes() + b"\n")
        fingerprints.add(compilation.fingerprint.__wrapped__())
    assert len(fingerprints) == 1 + len(sources)


def test_no_place_for_a_cache(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert offset_of(compiled_anew(LAYOUT)) == 11


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_cache_that_cannot_be_written(monkeypatch, error):
    """Full, or closed to us since it was chosen."""

    def refuse(*arguments):
        raise error

    monkeypatch.setattr(caching.IndexDataCacheFile, "_open_for_write", refuse)
    assert offset_of(compiled_anew(LAYOUT)) == 11


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied")])
def test_a_cache_that_cannot_be_read(monkeypatch, error):
    def refuse(*arguments):
        raise error

    compiled_anew(LAYOUT)
    monkeypatch.setattr(caching.IndexDataCacheFile, "_load_index", refuse)
    assert offset_of(compiled_anew(LAYOUT)) == 11


@pytest.mark.parametrize("damage", ["emptied", "halved", "garbage", "a pickle of something else"])
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_damaged_files_are_compiled_anew(cache, ending, damage):
    compiled_anew(LAYOUT)
    for file in files(cache, ending):
        content = file.read_bytes()
        damaged = {"emptied": b"", "halved": content[: len(content) // 2], "garbage": b"\x00\xffgarbage" * 9}
        file.write_bytes(damaged.get(damage, pickle.dumps((1, 2))))
    for _ in range(2):
        assert offset_of(compiled_anew(LAYOUT)) == 11


def test_processes_that_write_at_once_do_not_swap_kernels(monkeypatch):
    """Each reads the index, then writes the index, then the code. Between those, another process does all three."""
    save = caching.IndexDataCacheFile._save_data
    others = [OTHER]

    def save_late(self, name, data):
        if others:
            Path(self._index_path).unlink()  # the other process read before there was an index
            compiled_anew(others.pop())
        save(self, name, data)

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", save_late)
    compiled_anew(LAYOUT)
    assert offset_of(compiled_anew(OTHER)) == 12
    assert offset_of(compiled_anew(LAYOUT)) == 11


def test_threads_wait_for_one_compilation(monkeypatch):
    layout, compilations = LAYOUT._replace(offset=13), []
    cached = compilation._cached

    def counted(*arguments, **options):
        compilations.append(arguments)
        return cached(*arguments, **options)

    monkeypatch.setattr(compilation, "_cached", counted)
    addresses = []
    threads = [threading.Thread(target=lambda: addresses.append(compilation.kernel_address(layout))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(addresses) == 8
    assert len(set(addresses)) == 1
    assert len(compilations) == 1


OTHERS = ("compiled_layer", "compiled_share", "compiled_helper", "compiled_calls")
SECOND_PROCESS = f"""
from numba.core import event
from triton_sparse_rnn.kernels.cpu import compilation
from triton_sparse_rnn.kernels.cpu.pack import PackFormat
with event.install_recorder("numba:run_pass") as recorder:
    compilation.kernel_address({LAYOUT})
    for name in {OTHERS}:
        getattr(compilation, name)()
print(len(recorder.buffer))
"""


@pytest.mark.slow("processes")
def test_a_second_process_compiles_nothing_until_the_source_changes(cache, monkeypatch):
    compiled_anew(LAYOUT)
    for name in OTHERS:
        getattr(compilation, name).__wrapped__()
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SECOND_PROCESS]
    assert (
        subprocess.run(command, timeout=100, env=environment, capture_output=True, text=True, check=True).stdout
        == "0\n"
    )
    monkeypatch.setattr(compilation, "fingerprint", lambda: "of other source")
    for name in OTHERS:
        with passes() as anew:
            getattr(compilation, name).__wrapped__()
        assert anew
