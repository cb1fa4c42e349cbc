"""What export_c writes where, and what it refuses by name."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from c_builds import RUNTIME, STRICT, Running
from rounding import assert_same_sums
from torch import nn

from triton_sparse_rnn import Blocks, Picks, cli, export_c, save_sparse, to_sparse
from triton_sparse_rnn.export.c_export import RUNTIME_FILES
from triton_sparse_rnn.export.saved_layers import OneWeight
from triton_sparse_rnn.sparse.block_matrix import BlockMatrix
from triton_sparse_rnn.sparse.files import write_file


def pruned(layer: nn.RNNBase) -> nn.RNNBase:
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.2)
    return layer


def converted(layer: nn.Module, **options):
    options = {"backend": "reference", "storage": Picks(), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*little to skip")
        return to_sparse(layer, **options)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": pruned(nn.GRU(8, 18))})
        self.decoder = pruned(nn.LSTM(18, 20))
        self.head = nn.Linear(20, 8)


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return converted(Denoiser())


def names(paths: list[Path]) -> list[str]:
    assert all(path.is_file() for path in paths)
    return [path.name for path in paths[len(RUNTIME_FILES) :]]


def test_files(denoiser, tmp_path):
    files = export_c(denoiser.decoder, tmp_path / "new" / "folder")
    assert names(files) == ["model.h", "model.bin"]
    assert [path.name for path in files[: len(RUNTIME_FILES)]] == list(RUNTIME_FILES)
    assert {*RUNTIME_FILES} == {path.name for path in RUNTIME.iterdir()}
    assert all(
        (tmp_path / "new" / "folder" / name).read_bytes() == (RUNTIME / name).read_bytes() for name in RUNTIME_FILES
    )
    before = {path: path.read_bytes() for path in files}
    export_c(denoiser.decoder, tmp_path / "new" / "folder")
    assert {path: path.read_bytes() for path in files} == before


def test_each_layer_of_a_model(denoiser, tmp_path):
    assert names(export_c(denoiser, tmp_path)) == ["encoder_rnn.h", "encoder_rnn.bin", "decoder.h", "decoder.bin"]
    files = export_c(denoiser, tmp_path, name="de", data="array")
    assert names(files) == ["de_encoder_rnn.h", "de_encoder_rnn.c", "de_decoder.h", "de_decoder.c"]


@pytest.mark.parametrize("kind", ["names", "list", "Sequential"])
def test_a_chain(denoiser, kind, tmp_path):
    layers = [denoiser.encoder["rnn"], denoiser.decoder, denoiser.head]
    if kind == "names":
        files = export_c(denoiser, tmp_path, chain=["encoder.rnn", "decoder", "head"], name="all")
    elif kind == "list":
        files = export_c(layers, tmp_path, name="all")
    else:
        files = export_c(nn.Sequential(nn.Sequential(*layers[:2]), layers[2]), tmp_path, name="all")
    assert names(files) == ["all.h", "all.bin"]
    header = (tmp_path / "all.h").read_text()
    assert "#define ALL_INPUTS       8 " in header
    assert "#define ALL_OUTPUTS      8 " in header
    assert "#define ALL_STATE_FLOATS 58 " in header
    assert "LINEAR, 20 -> 8, float32 dense" in header


def test_who_made_it_and_the_licence_are_said(denoiser, tmp_path):
    for path in export_c(denoiser, tmp_path) + export_c(denoiser, tmp_path, data="array"):
        if path.suffix != ".bin":
            text = path.read_text()
            assert "triton-sparse-rnn" in text[:1000]
            assert "SPDX-License-Identifier: Apache-2.0" in text or "as free as the" in text


@pytest.mark.slow("compiler")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_an_array_is_the_blob(denoiser, compiler, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    export_c(denoiser.decoder, tmp_path)
    export_c(denoiser.decoder, tmp_path, data="array")
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "model.h"\n#include "tsr_runtime.h"\n'
        "int main(void)\n{\n    static unsigned char memory[MODEL_STREAM_BYTES];\n"
        "    tsr_model model;\n    tsr_stream stream;\n"
        "    if (tsr_open(&model, model_blob, MODEL_BLOB_BYTES) != TSR_OK)\n        return 1;\n"
        "    if (tsr_init(&stream, &model, memory, sizeof memory) != TSR_OK)\n        return 2;\n"
        "    return fwrite(model_blob, 1, sizeof model_blob, stdout) != sizeof model_blob;\n}\n"
    )
    sources = [str(tmp_path / name) for name in ("main.c", "model.c", "tsr_runtime.c")]
    program = tmp_path / "main"
    subprocess.run([compiler, *STRICT, "-O1", f"-I{tmp_path}", *sources, "-o", program], check=True)
    done = subprocess.run([program], check=True, capture_output=True)
    assert done.stdout == (tmp_path / "model.bin").read_bytes()
    if compiler == "gcc":
        (tmp_path / "main.cpp").write_text('#include "model.h"\nunsigned char f() { return model_blob[0]; }\n')
        command = ["g++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", str(tmp_path / "main.cpp")]
        subprocess.run([*command, "-o", tmp_path / "cpp.o"], check=True)


def stored_linear(pattern, **options) -> OneWeight:
    """As a persistent linear layer holds its numbers."""
    torch.manual_seed(0)
    weight = torch.randn(20, 40) * (torch.rand(20, 40) < 0.2)
    return OneWeight(BlockMatrix.from_dense(weight, pattern, **options), torch.randn(20), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("pattern", [Picks(), Blocks(16, 1)], ids=str)
def test_a_linear_layer_without_its_zeros(pattern, dtype, tmp_path):
    layer = stored_linear(pattern, dtype=dtype)
    assert names(export_c(nn.ModuleDict({"a": layer}), tmp_path)) == ["a.h", "a.bin"]
    assert names(export_c(layer, tmp_path)) == ["model.h", "model.bin"]
    stored = "picks of 16x1 in 32" if isinstance(pattern, Picks) else "blocks of 16x1"
    assert f"LINEAR, 40 -> 20, {str(dtype).removeprefix('torch.')} in {stored}" in (tmp_path / "model.h").read_text()
    x = torch.randn(3, 40)
    expected = torch.nn.functional.linear(x, layer.weight.to_dense(), layer.bias)
    assert_same_sums([Running(layer).run(x)], [expected], 41)


def test_a_linear_layer_that_rounds_its_inputs_is_refused(tmp_path):
    layer = stored_linear(Picks(), dtype=torch.int8)
    layer.activation_dtype = torch.int8
    with pytest.raises(ValueError, match=r"model has activation_dtype=torch\.int8"):
        export_c(layer, tmp_path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.GRU(2, 3), ValueError, "model must hold a layer that to_sparse.. made, got a GRU with none"),
        (lambda: [nn.GRU(2, 3)], TypeError, "'0' must be a PersistentRNN.*got GRU; convert it with to_sparse"),
        (lambda: [nn.Linear(2, 3), nn.Softmax(0)], TypeError, "'1' must be .*got Softmax"),
        (lambda: [nn.Linear(2, 3), nn.Linear(4, 5)], ValueError, "'1', a Linear, takes 4 inputs, .* gives 3"),
        (lambda: [nn.ReLU(), nn.Linear(4, 5)], ValueError, "'0', a ReLU, must follow a layer"),
        (lambda: [nn.Identity()], ValueError, "must hold a layer that computes something"),
        (list, ValueError, "must hold a layer that computes something"),
        (lambda: "model", TypeError, "model must be an nn.Module or a sequence of them, got str"),
        (lambda: [3], TypeError, "model must hold modules, got int"),
        (lambda: nn.Linear(2, 3, dtype=torch.float64), ValueError, "model, a Linear, is in torch.float64"),
        (lambda: nn.Linear(2, 3, device="meta"), ValueError, "model is on the meta device"),
        (lambda: converted(nn.GRU(2, 3).double()), ValueError, "model, a PersistentGRU, is in torch.float64"),
        (
            lambda: converted(nn.GRU(2, 3), weight_dtype=torch.int8, activation_dtype=torch.int8),
            ValueError,
            "model has activation_dtype=torch.int8.*activation_dtype=None",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_c(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_hooks_are_refused(denoiser, tmp_path):
    with denoiser.decoder.register_forward_hook(print), pytest.raises(ValueError, match=r"'decoder', .*forward hooks"):
        export_c(denoiser, tmp_path)


def test_indices_that_somebody_wrote_into(tmp_path):
    layer = converted(nn.GRU(8, 18))
    layer.weight_hh_l0_starts[1] = -1
    with pytest.raises(ValueError, match="model has parts of weight_hh_l0 that do not fit together"):
        export_c(layer, tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": "text"}, ValueError, "data must be one of 'blob', 'array', got 'text'"),
        ({"name": "a b"}, ValueError, "name must be a C identifier"),
        ({"name": "tsr_runtime"}, ValueError, "name must be a C identifier that does not begin with tsr_"),
        ({"name": 3}, TypeError, "name must be a string, got int"),
        ({"chain": "decoder"}, TypeError, "chain must be a sequence of names"),
        ({"chain": []}, TypeError, "chain must be a sequence of names"),
        ({"chain": ["decoder", "nothing"]}, ValueError, "chain must name submodules of model, got 'nothing'"),
    ],
)
def test_wrong_arguments(denoiser, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_c(denoiser, tmp_path, **options)


def test_a_chain_is_not_named_twice(denoiser, tmp_path):
    with pytest.raises(ValueError, match="chain must be None"):
        export_c([denoiser.decoder], tmp_path, chain=["0"])


def test_names_that_are_one_in_c(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.GRU(2, 3)}), "a_b": nn.GRU(2, 3)})
    with pytest.raises(ValueError, match=r"'a\.b' and 'a_b', which would both be a_b in C"):
        export_c(converted(model), tmp_path)


def test_a_name_that_begins_with_a_digit(tmp_path):
    model = nn.ModuleList([nn.GRU(2, 3)])
    assert names(export_c(converted(model), tmp_path)) == ["layer_0.h", "layer_0.bin"]


def test_command(denoiser, tmp_path, capsys):
    save_sparse(denoiser, tmp_path / "model.safetensors")
    arguments = ["export-c", str(tmp_path / "model.safetensors"), str(tmp_path / "c")]
    assert cli.main(arguments) == 0
    assert "encoder_rnn.bin" in capsys.readouterr().out
    files = export_c(denoiser, tmp_path / "python")
    assert all((tmp_path / "c" / path.name).read_bytes() == path.read_bytes() for path in files)
    assert cli.main([*arguments, "--name", "both", "--array", "--chain", "encoder.rnn", "decoder"]) == 0
    export_c(denoiser, tmp_path / "python", chain=["encoder.rnn", "decoder"], name="both", data="array")
    assert (tmp_path / "c" / "both.c").read_bytes() == (tmp_path / "python" / "both.c").read_bytes()


def test_command_for_a_chain_with_what_was_not_converted(denoiser, tmp_path):
    path = tmp_path / "model.safetensors"
    save_sparse(denoiser, path)
    assert cli.main(["export-c", str(path), str(tmp_path), "--chain", "decoder", "relu", "head", "tanh"]) == 0
    blob = (tmp_path / "model.bin").read_bytes()
    export_c([denoiser.decoder, nn.ReLU(), denoiser.head, nn.Tanh()], tmp_path)
    assert (tmp_path / "model.bin").read_bytes() == blob


def test_a_linear_layer_out_of_a_file(tmp_path):
    layer = stored_linear(Picks())
    parts = {f"out.weight_{name}": part for name, part in layer.weight.parts().items() if part is not None}
    parts["out.bias"] = torch.ones(20)
    layer.bias = parts["out.bias"]
    config = {"in_features": 40, "out_features": 20, "bias": True}
    described = {"class": "PersistentLinear", "dtype": "float32", "activation_dtype": None, "config": config}
    write_file(tmp_path / "file", parts, {"modules": {"out": described}})
    assert cli.main(["export-c", str(tmp_path / "file"), str(tmp_path), "--name", "a"]) == 0
    export_c(layer, tmp_path, name="b")
    assert (tmp_path / "a_out.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_command_for_a_layer_that_is_the_model(tmp_path):
    layer = converted(nn.Sequential(OrderedDict(rnn=nn.LSTM(4, 5, bidirectional=True, proj_size=2))))[0]
    save_sparse(layer, tmp_path / "layer.safetensors")
    assert cli.main(["export-c", str(tmp_path / "layer.safetensors"), str(tmp_path)]) == 0
    before = (tmp_path / "model.bin").read_bytes()
    export_c(layer, tmp_path)
    assert (tmp_path / "model.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--chain", "foot"], "it holds no layer 'foot', but 'decoder', 'encoder.rnn' that were converted, and 'head'"),
        (
            ["--chain", "decoder", "encoder.rnn"],
            "'encoder.rnn', a PersistentGRU, takes 8 inputs, but what is before it in the chain gives 20",
        ),
        (["--name", "a-b"], "name must be a C identifier"),
    ],
)
def test_command_with_wrong_arguments(denoiser, more, message, tmp_path, capsys):
    save_sparse(denoiser, tmp_path / "model.safetensors")
    assert cli.main(["export-c", str(tmp_path / "model.safetensors"), str(tmp_path / "c"), *more]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


def test_command_for_what_is_no_file_of_ours(denoiser, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    assert cli.main(["export-c", str(path), str(tmp_path)]) == cli.USER_ERROR
    assert "No such file" in capsys.readouterr().err
    save_sparse(denoiser, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["export-c", str(path), str(tmp_path)]) == cli.USER_ERROR
    assert "truncated or damaged" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    save_sparse(denoiser, path)
    assert cli.main(["export-c", str(path), str(tmp_path / "file")]) == cli.USER_ERROR
    assert "file: File exists" in capsys.readouterr().err
