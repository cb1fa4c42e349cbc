import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from triton_sparse_rnn.errors import SparseFileError
from triton_sparse_rnn.sparse import files
from triton_sparse_rnn.sparse.files import read_file, write_file

DESCRIPTION = {"modules": {"rnn": {"sizes": [3, 4]}}, "name": "ä\0"}


def make_tensors():
    table, square = torch.arange(12.0).view(3, 4), torch.rand(3, 3)
    return {
        "weight": table,
        "transposed": table.t(),  # another view of one storage
        "square": square,
        "square transposed": square.t(),
        "rows": table[1:],
        "column": table[:, 2],
        "tied": table,
        "expanded": torch.ones(1, 1).expand(2, 3),
        "part": torch.arange(100)[40:44],
        "scalar": torch.tensor(-0.0),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "int64": torch.tensor(2**60),
        "bfloat16": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "float16": torch.ones(1, 1, 1, 2, dtype=torch.float16),
        "float64": torch.rand(3, dtype=torch.float64),
        "complex": torch.tensor([1 + 2j]).conj(),
        "parameter": torch.nn.Parameter(torch.rand(2)),
    }


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(ours[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_every_kind_of_tensor_comes_back(tmp_path):
    path = tmp_path / "a folder" / "mödel.file"
    path.parent.mkdir()
    tensors = make_tensors()
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    write_file(str(path), tensors, DESCRIPTION)
    assert_same_tensors(tensors, before)
    read, description = read_file(str(path))
    assert description == DESCRIPTION
    assert_same_tensors(read, before)
    assert read["tied"] is read["weight"]
    assert read["rows"].untyped_storage().data_ptr() != read["weight"].untyped_storage().data_ptr()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_plain_safetensors_reads_the_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, make_tensors(), {})
    plain = load_file(path)
    tensors = make_tensors()
    tensors.pop("tied")
    assert plain.keys() == tensors.keys()
    assert torch.equal(plain["transposed"], tensors["transposed"])
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


@pytest.mark.parametrize("mask", [0o027, 0o002])
def test_the_umask_is_never_changed(tmp_path, monkeypatch, mask):
    def refuse(mask):
        raise AssertionError("other threads that create files would see it")

    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", refuse)
            write_file(tmp_path / "file", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, {"weight": torch.zeros(50)}, {})
    weight = read_file(path)[0]["weight"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(weight, torch.zeros(50))


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("files") / "file"
    write_file(path, {"a": torch.arange(5.0), "b": torch.tensor([True]), "c": torch.empty(0)}, DESCRIPTION)
    return path.read_bytes()


def assert_refused(path: Path, content: bytes, message="nothing was loaded"):
    path.write_bytes(content)
    with pytest.raises(SparseFileError, match=message) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path, content):
    for length in {*range(20), *range(0, len(content), 5), *range(len(content) - 30, len(content))}:
        assert_refused(tmp_path / "file", content[:length])


def test_every_flipped_bit_is_refused(tmp_path, content):
    for place in range(len(content)):
        for bit in [place % 8] if 8 < place < len(content) - 25 else range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            assert_refused(tmp_path / "file", bytes(damaged))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content + b"\0",
        lambda content: content + b" " * 8,
        lambda content: content * 2,
        lambda content: content[8:],
        lambda content: b"\0" + content,
        lambda content: content[:-8] + content[-4:] + content[-8:-4],
        lambda content: content.replace(b"\r", b"\n") + b"\n",
        lambda content: bytes(len(content)),
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        lambda content: pickle.dumps({"weight": torch.zeros(3)}),
        lambda content: b"PK\x03\x04" + content,
        lambda content: b"{}",
    ],
)
def test_other_damage_is_refused(tmp_path, content, damage):
    assert_refused(tmp_path / "file", damage(content))


def rewrite(content: bytes, change) -> bytes:
    """The file with another header, which `change` edits."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "was not written by save_sparse"),
        (lambda header: header["__metadata__"].update(format="pt"), "was not written by save_sparse"),
        (lambda header: header["__metadata__"].pop("description"), "was not written by save_sparse"),
        (lambda header: header["__metadata__"].update(version="2"), "has version 2 .* reads version 1"),
        (lambda header: header["__metadata__"].pop("version"), "has version None"),
        (lambda header: header["__metadata__"].pop("sha256"), "is damaged"),
        (lambda header: header["__metadata__"].update(sha256="0" * 64), "is damaged"),
        (lambda header: header["__metadata__"].update(description="{}"), "is damaged"),
        (lambda header: header.update(d=header.pop("a")), "is damaged"),
        (lambda header: header["a"].update(dtype="I32"), "is damaged"),
        (lambda header: header["a"].update(shape=[5, 1]), "is damaged"),
        (lambda header: header.pop("c"), "is damaged"),
        (lambda header: header["a"].update(dtype="F99"), "is not a safetensors file"),
        (lambda header: header["a"].update(shape=[6]), "is not a safetensors file"),
        (lambda header: header["a"].update(shape=[2**40, 2**40]), "is not a safetensors file"),
        (lambda header: header["a"].update(data_offsets=[0, 2**60]), "is not a safetensors file"),
        (lambda header: header["__metadata__"].update(extra=1), "is not a safetensors file"),
    ],
)
def test_another_header_is_refused(tmp_path, content, change, message):
    assert_refused(tmp_path / "file", rewrite(content, change), message)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "null", "{}", '{"aliases": 3}', '{"aliases": {"x": "y"}, "content": 1}', '{"aliases": {}}'),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="a hundred thousand objects in each other"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="a hundred thousand lists in each other"),
    ],
)
def test_a_forged_description_is_refused(tmp_path, text):
    tensors = {"a": torch.arange(5.0)}
    metadata = {"format": "triton-sparse-rnn", "version": "1", "description": text}
    metadata["sha256"] = files._digest(tensors, text)
    save_file(tensors, tmp_path / "file", metadata=metadata)
    with pytest.raises(SparseFileError, match="describes its tensors wrongly"):
        read_file(tmp_path / "file")


def test_no_file_and_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        read_file(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "missing" / "file", {}, {})
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad", [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.zeros(3).to("meta").expand(2, 3)]
)
def test_a_refused_save_keeps_the_old_file(tmp_path, bad):
    path = tmp_path / "file"
    write_file(path, {"a": torch.zeros(1)}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="a must be a tensor with numbers, got layout"):
        write_file(path, {"b": torch.zeros(1), "a": bad}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """In other processes too: safetensors' own writer orders the metadata anew at every call."""
    tensors = make_tensors()
    for name in ("square", "square transposed", "float64", "parameter"):  # drawn at random
        tensors[name] = torch.zeros(2)
    contents = set()
    for _ in range(12):
        write_file(tmp_path / "file", tensors, DESCRIPTION)
        contents.add((tmp_path / "file").read_bytes())
    assert len(contents) == 1
    header, length = contents.pop(), 8
    length += int.from_bytes(header[:8], "little")
    assert length % 8 == 0
    assert b'{"__metadata__":{"description":' in header[:length]


def test_a_pipe_is_no_file_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="Not a regular file") as caught:
            read_file(path)
        assert caught.value.filename == str(path)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path, monkeypatch):
    """In a mapping of the file the process would end by SIGBUS."""
    path = tmp_path / "file"
    write_file(path, {"a": torch.zeros(100_000)}, {})
    read_metadata = files._read_metadata

    def cut_off(path, file):
        metadata = read_metadata(path, file)
        os.truncate(path, 5000)
        return metadata

    monkeypatch.setattr(files, "_read_metadata", cut_off)
    with pytest.raises(SparseFileError, match="is not a safetensors file or is truncated"):
        read_file(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**9, 200_000_000, 5000])
def test_a_header_longer_than_the_file_or_than_any(tmp_path, length):
    with (tmp_path / "file").open("wb") as file:
        file.write(struct.pack("<Q", length) + b'{"a":')
        file.truncate(300_000_000 if length == 200_000_000 else 100)  # a hole takes no room
    with pytest.raises(SparseFileError, match="is not a safetensors file"):
        read_file(tmp_path / "file")


def test_a_dtype_that_the_format_cannot_hold(tmp_path):
    tensors = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.complex128)}
    with pytest.raises(ValueError, match=r"^b must have a dtype that safetensors can hold, got torch.complex128"):
        write_file(tmp_path / "file", tensors, {})
    assert list(tmp_path.iterdir()) == []
