"""Files that are written whole or not at all: full disks, permissions, links, names, interrupts."""

import errno
import os
import resource
import stat
from pathlib import Path

import pytest

from triton_sparse_rnn import atomic_files
from triton_sparse_rnn.atomic_files import write_atomically

OLD, NEW = b"old", b"new content"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_with_umask(mask: int, path: Path) -> None:
    before = os.umask(mask)
    try:
        write_atomically(path, [NEW])
    finally:
        os.umask(before)


def assert_as_it_was(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


def test_parts_are_written_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atomic_files, "_BLOCK_BYTES", 3)
    write_atomically(str(tmp_path / "file"), [b"ab", b"", memoryview(bytearray(b"cdefghi"))[1:]])
    assert (tmp_path / "file").read_bytes() == b"abdefghi"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664, 0o444, 0o4755])
def test_an_old_file_keeps_its_permissions(tmp_path: Path, mode: int, mask: int):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    path.chmod(mode)
    write_with_umask(mask, path)
    assert (path.read_bytes(), mode_of(path)) == (NEW, mode)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_what_the_umask_leaves(tmp_path: Path, mask: int):
    write_with_umask(mask, tmp_path / "file")
    assert mode_of(tmp_path / "file") == 0o666 & ~mask


def test_nobody_reads_in_the_meantime_what_they_could_not_read_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, modes = tmp_path / "file", []
    path.write_bytes(OLD)
    path.chmod(0o640)
    monkeypatch.setattr(os, "fchmod", lambda file, mode: modes.append(stat.S_IMODE(os.fstat(file).st_mode)))
    write_with_umask(0, path)
    assert modes == [0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to others")
def test_owner_and_group_are_kept_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    try:
        os.chown(path, 1234, 4321)
    except OSError as error:
        pytest.skip(f"this root may not give files to others: {error}")  # one of a user namespace
    path.chmod(0o2750)
    write_atomically(path, [NEW])
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (1234, 4321, 0o2750)
    give = os.fchown

    def only_the_group(file: int, uid: int, gid: int) -> None:
        if uid != -1:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        give(file, uid, gid)

    monkeypatch.setattr(os, "fchown", only_the_group)
    write_atomically(path, [OLD])
    assert (path.stat().st_uid, path.stat().st_gid, mode_of(path)) == (0, 4321, 0o2750)


def test_a_link_is_followed(tmp_path: Path):
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    (tmp_path / "second").symlink_to(target)
    (tmp_path / "first").symlink_to("second")
    for content in (OLD, NEW):  # it points to nothing at first
        write_atomically(tmp_path / "first", [content])
        assert target.read_bytes() == content
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_links_in_a_circle(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        write_atomically(tmp_path / "a", [NEW])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["x" * 242, "x" * 255, "ü" * 127, ".", "-", " ", "a\nb"])
def test_every_legal_name(tmp_path: Path, name: str):
    folder = tmp_path / "folder"
    folder.mkdir()
    if name == ".":
        with pytest.raises(IsADirectoryError):
            write_atomically(folder / name, [NEW])
    else:
        write_atomically(folder / name, [NEW])
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(name, NEW)]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("missing/file", FileNotFoundError, "No such file or directory"),
        ("file/more", NotADirectoryError, "Not a directory"),
        ("folder", IsADirectoryError, "Is a directory"),
        ("pipe", OSError, "Not a regular file"),
        ("x" * 256, OSError, "File name too long"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, error: type[OSError], words: str):
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=f"{words} .nothing was written.") as caught:
        write_atomically(tmp_path / name, [NEW])
    assert caught.value.filename == str(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_stays_a_device():
    with pytest.raises(OSError, match=r"Not a regular file .*/dev/null"):
        write_atomically("/dev/null", [NEW])
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@pytest.fixture
def full_disk():
    """Room for 4 KB in a file; a real error of a real write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [4097, 10**6])
def test_a_disk_without_room(tmp_path: Path, full_disk: None, size: int):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"File too large \(nothing was written\)") as caught:
        write_atomically(path, [bytes(size)])
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert caught.value.__cause__ is None
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(OLD)
    with pytest.raises(OSError, match=r"File too large \(nothing was written; the file that was there is as it was\)"):
        write_atomically(path, [b"a", bytes(size)])
    assert_as_it_was(path)


FAILING = {"write": "_write", "sync": "os.fsync", "replace": "Path.replace"}


@pytest.mark.parametrize("step", FAILING)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_what_stops_it_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
):
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(f"triton_sparse_rnn.atomic_files.{FAILING[step]}", fail)
    with pytest.raises(type(error)) as caught:
        write_atomically(path, [NEW])
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert_as_it_was(path)


def test_an_error_while_parts_are_made_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def parts():
        yield NEW
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_atomically(path, parts())
    assert_as_it_was(path)


def test_all_is_on_the_disk_before_and_after_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, calls = tmp_path / "file", []
    replace, sync = Path.replace, os.fsync

    def note_sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("folder" if is_folder else f"{os.fstat(descriptor).st_size} bytes")
        sync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        calls.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write_atomically(path, [NEW])
    assert calls == [f"{len(NEW)} bytes", "replace", "folder"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    sync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    if number == errno.EINVAL:  # the file system has nothing to sync
        write_atomically(tmp_path / "file", [NEW])
    else:
        with pytest.raises(OSError, match="it is written, but may be lost in a power cut"):
            write_atomically(tmp_path / "file", [NEW])
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_file, synced = os.open, []

    def open_no_folder(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "sync", lambda: synced.append(True))
    write_atomically(tmp_path / "file", [NEW])
    assert (tmp_path / "file").read_bytes() == NEW
    assert synced == [True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(OLD)
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError, match=r"Permission denied .*as it was.*folder/file"):
        write_atomically(path, [NEW])
    path.parent.chmod(0o700)
    assert_as_it_was(path)
