from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from triton_sparse_rnn.checkpoint_files import CheckpointFileError, read_state_dict
from triton_sparse_rnn.conversion import to_sparse
from triton_sparse_rnn.report import sparsity_report
from triton_sparse_rnn.saving import save_sparse
from triton_sparse_rnn.sparse.files import read_file, write_file


@pytest.fixture
def model() -> nn.Module:
    layer = nn.GRU(20, 32)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight = layer.get_parameter(name)
        weight.data[:, torch.arange(weight.shape[1]) % 5 > 0] = 0
    return nn.Sequential(layer, nn.Linear(32, 3)).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {**state, "epoch": 3},
    ],
)
def test_torch_files(tmp_path: Path, model: nn.Module, wrap):
    path = tmp_path / "model.pt"
    torch.save(wrap(model.state_dict()), path)
    assert sparsity_report(read_state_dict(path)) == sparsity_report(model)


def test_files_of_old_torch(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert sparsity_report(read_state_dict(path)) == sparsity_report(model)


def test_safetensors_files_whatever_their_name(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model.bin"
    save_file(model.state_dict(), path)
    report = sparsity_report(read_state_dict(path))
    assert sorted(report.weights, key=str) == sorted(sparsity_report(model).weights, key=str)


def test_files_of_save_sparse(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model.safetensors"
    converted = to_sparse(model, block_size=(8, 1), weight_dtype=torch.int8, backend="reference")
    save_sparse(converted, path)
    theirs, ours = sparsity_report(read_state_dict(path)), sparsity_report(converted)
    assert sorted(theirs.weights, key=str) == sorted(ours.weights, key=str)
    assert sorted(theirs.others, key=str) == sorted(ours.others, key=str)


WEIGHT = "0.weight_hh_l0"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda tensors, matrix: tensors[f"{WEIGHT}_columns"].fill_(99), "columns must lie in"),
        (lambda tensors, matrix: tensors[f"{WEIGHT}_starts"].fill_(2**30), "starts must rise"),
        (lambda tensors, matrix: tensors.pop(f"{WEIGHT}_starts"), "NoneType"),
        (lambda tensors, matrix: matrix.update(shape=[960, 32]), "do not fit together"),
        (lambda tensors, matrix: matrix.update(shape=[96.0, 32]), "float"),
        (lambda tensors, matrix: matrix.update(shape=[96]), "unpack"),
        (lambda tensors, matrix: matrix.update(gates=0), "0 gates in 96 rows"),
        (lambda tensors, matrix: matrix.update(gates=-3), "-3 gates in 96 rows"),
        (lambda tensors, matrix: matrix.update(gates=7), "7 gates in 96 rows"),
        (lambda tensors, matrix: matrix.clear(), "KeyError"),
    ],
)
def test_forged_blocks_are_found(tmp_path: Path, model: nn.Module, forge: Callable[..., Any], message: str):
    path = tmp_path / "model"
    save_sparse(to_sparse(model), path)
    tensors, description = read_file(path)
    forge(tensors, description["modules"]["0"]["weights"]["weight_hh_l0"])
    write_file(path, tensors, description)
    with pytest.raises(CheckpointFileError, match=f"model: describes its weights wrongly .*{message}"):
        read_state_dict(path)


def test_forged_columns_take_no_memory(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model"
    save_sparse(to_sparse(model, block_size=(16, 1)), path)
    tensors, description = read_file(path)
    description["modules"]["0"]["weights"]["weight_ih_l0"]["shape"] = [96, 2**30]
    write_file(path, tensors, description)
    assert sparsity_report(read_state_dict(path)).nonzero == sparsity_report(model).nonzero


@pytest.mark.parametrize("kind", ["torch", "safetensors", "save_sparse"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "beginning"])
def test_damage_is_found(tmp_path: Path, model: nn.Module, kind: str, damage: str):
    path = tmp_path / "model"
    if kind == "torch":
        torch.save(model.state_dict(), path)
    elif kind == "safetensors":
        save_file(model.state_dict(), path)
    else:
        save_sparse(to_sparse(model), path)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        if kind == "safetensors":
            pytest.skip("plain safetensors files carry no checksum")
        data[len(data) // 2] ^= 0x10
    else:
        data[:6] = b"XXXXXX"
    path.write_bytes(data)
    with pytest.raises(CheckpointFileError, match=r"model: .*damaged"):
        read_state_dict(path)


def test_objects_are_not_loaded(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model.pt"
    torch.save(model, path)
    with pytest.raises(CheckpointFileError, match=r"other than tensors.*save model.state_dict"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.ones(3), {"model": {"epoch": 3}}, {}])
def test_files_without_a_state_dict(tmp_path: Path, content: object):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointFileError, match="holds no state_dict, but a "):
        read_state_dict(path)


def test_what_is_no_file_of_ours(tmp_path: Path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("just some text, not a checkpoint")
    with pytest.raises(CheckpointFileError, match="missing: No such file"):
        read_state_dict(tmp_path / "missing")
    with pytest.raises(CheckpointFileError, match="Is a directory"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointFileError, match="is empty"):
        read_state_dict(tmp_path / "empty")
    with pytest.raises(CheckpointFileError, match=r"not a checkpoint|other than tensors"):
        read_state_dict(tmp_path / "text")
