import dataclasses
import os
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
    converted = to_sparse(model, storage=(8, 1), weight_dtype=torch.int8, backend="reference")
    save_sparse(converted, path)
    theirs, ours = sparsity_report(read_state_dict(path)), sparsity_report(converted)
    assert sorted(theirs.weights, key=str) == sorted(ours.weights, key=str)
    assert sorted(theirs.others, key=str) == sorted(ours.others, key=str)


WEIGHT = "0.weight_hh_l0"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda tensors, config: tensors[f"{WEIGHT}_columns"].fill_(99), "columns must lie in"),
        (lambda tensors, config: tensors[f"{WEIGHT}_starts"].fill_(2**30), "starts must rise"),
        (lambda tensors, config: tensors.pop(f"{WEIGHT}_starts"), "starts must not be None beside blocks"),
        (lambda tensors, config: config.update(hidden_size=320), "do not fit together"),
        (lambda tensors, config: config.update(hidden_size=32.0), "float"),
        (lambda tensors, config: config.update(hidden_size=0), "hidden_size must be at least 1"),
        (lambda tensors, config: config.update(num_layers=-3), "num_layers must be at least 1"),
        (lambda tensors, config: config.update(num_layers=10**12), "KeyError.*weight_ih_l1_values"),
        (lambda tensors, config: config.update(mode="QRNN"), "mode must be one of"),
        (lambda tensors, config: config.update(mode="LSTM"), "do not fit together"),
        (lambda tensors, config: config.clear(), "mode"),
    ],
)
def test_forged_blocks_are_found(tmp_path: Path, model: nn.Module, forge: Callable[..., Any], message: str):
    path = tmp_path / "model"
    save_sparse(to_sparse(model), path)
    tensors, description = read_file(path)
    forge(tensors, description["modules"]["0"]["config"])
    write_file(path, tensors, description)
    with pytest.raises(CheckpointFileError, match=f"model: describes its weights wrongly .*{message}"):
        read_state_dict(path)


@pytest.mark.parametrize("columns", [2**30, 2**31, 10**12, 10**30])
def test_forged_columns_take_no_memory(tmp_path: Path, model: nn.Module, columns: int):
    path = tmp_path / "model"
    save_sparse(to_sparse(model, storage=(16, 1)), path)
    tensors, description = read_file(path)
    description["modules"]["0"]["config"]["input_size"] = columns
    write_file(path, tensors, description)
    with pytest.raises(CheckpointFileError, match=r"model: 0.weight_ih_l0 of shape .* would take|shape must be two"):
        read_state_dict(path)


def test_no_weights_at_all_of_any_shape(tmp_path: Path, model: nn.Module):
    path = tmp_path / "model"
    save_sparse(to_sparse(model, storage=(16, 1)), path)
    tensors, description = read_file(path)
    size = 2**31 - 1
    description["modules"]["0"]["config"] |= {"mode": "RNN_TANH", "input_size": 0, "hidden_size": size}
    for name, columns in (("weight_ih_l0", 1), ("weight_hh_l0", size)):
        tensors[f"0.{name}_values"] = torch.empty(0, columns, size)
        tensors[f"0.{name}_columns"] = torch.empty(0, dtype=torch.int32)
        tensors[f"0.{name}_starts"] = torch.zeros(2, dtype=torch.int32)
    write_file(path, tensors, description)
    with pytest.raises(CheckpointFileError, match=r"0.weight_hh_l0 of shape .* would take .* the whole file has"):
        read_state_dict(path)


def test_blocks_of_another_number_of_gates(tmp_path: Path, model: nn.Module):
    save_sparse(to_sparse(model, storage=(16, 1)), tmp_path / "model")
    state = read_state_dict(tmp_path / "model")
    weight: Any = state[WEIGHT]
    state[WEIGHT] = dataclasses.replace(weight, gates=2)  # of the same number of rows of blocks
    with pytest.raises(ValueError, match=r"0.weight_hh_l0 is of 3 gates in its layer, but is stored as of 2"):
        sparsity_report(state)


@pytest.mark.parametrize("keys", [["model"], ["model", "state_dict"], ["module", "model", "state_dict"]])
def test_a_dict_that_holds_itself(tmp_path: Path, keys: list[str]):
    outer: dict[str, Any] = {"epoch": 1}
    inner = outer
    for key in keys[:-1]:
        inner[key] = {}
        inner = inner[key]
    inner[keys[-1]] = outer
    torch.save(outer, tmp_path / "model.pt")
    with pytest.raises(CheckpointFileError, match=r"model.pt: holds no state_dict, but a dict of \['epoch', "):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.sparse_coo_tensor(
            torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (10**6, 10**6), check_invariants=True
        ),
    ],
    ids=["expanded", "sparse"],
)
def test_a_tensor_of_which_next_to_nothing_is_stored(tmp_path: Path, tensor: torch.Tensor):
    torch.save({"weight": tensor}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointFileError, match=r"weight of shape .* would take 4,000,000,000,000 bytes, and the whole"
    ):
        read_state_dict(tmp_path / "model.pt")
    torch.save({"weight": torch.zeros(1).expand(500, 500)}, tmp_path / "model.pt")  # an ordinary one
    assert read_state_dict(tmp_path / "model.pt")["weight"].shape == (500, 500)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_indices_beyond_the_tensor(tmp_path: Path, layout: str):
    """They are looked at only when torch is told to, which reads and writes where they say."""
    eye = torch.eye(4)
    sparse = eye.to_sparse() if layout == "coo" else eye.to_sparse_csr()
    (sparse._indices()[1] if layout == "coo" else sparse.col_indices())[2] = 10**9
    torch.save({"weight": sparse}, tmp_path / "model.pt")
    with pytest.raises(CheckpointFileError, match=r"model.pt: not a checkpoint, or damaged"):
        read_state_dict(tmp_path / "model.pt")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointFileError, match="pipe: Not a regular file"):
        read_state_dict(tmp_path / "pipe")


@pytest.mark.parametrize("dtype", ["F99", "F4", "F6_E2M3", "I32"])
def test_forged_safetensors(tmp_path: Path, dtype: str):
    path = tmp_path / "model"
    save_file({"weight": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes().replace(b'"F32"', f'"{dtype}"'.encode().ljust(5)))
    if dtype == "I32":
        assert torch.equal(torch.zeros(8, dtype=torch.int32), read_state_dict(path)["weight"])  # type: ignore[arg-type]
    else:
        with pytest.raises(CheckpointFileError, match="model: a damaged safetensors file"):
            read_state_dict(path)


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
