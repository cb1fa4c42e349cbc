"""Files that are damaged, of something else or forged: refused, and nothing is loaded."""

import pytest
import torch
from saved_models import assert_refused, forge, make_gru, prepare

from triton_sparse_rnn import save_sparse, to_sparse


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b"", lambda c: c[: len(c) // 2]])
def test_a_damaged_file_leaves_the_model_alone(tmp_path, damage):
    prepare(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(damage(content))
    assert_refused(tmp_path / "file", "nothing was loaded")


NAME = "rnn.weight_hh_l1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"] + 1}), "starts must rise from 0"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"] * 1000}), "starts must rise from 0"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"][:-1].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_starts": t[f"{NAME}_starts"].long()}), "starts must be torch.int32"),
        (lambda t: t.update({f"{NAME}_columns": t[f"{NAME}_columns"] + 6}), "columns must lie in 0..5"),
        (lambda t: t.update({f"{NAME}_columns": t[f"{NAME}_columns"] - 1}), "columns must lie in 0..5"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"][:-1].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"][0].clone()}), "do not fit together"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"].int()}), "values must be one of"),
        (lambda t: t.update({f"{NAME}_values": t[f"{NAME}_values"].to(torch.int8)}), "scales must not be None beside"),
        (lambda t: t.update({f"{NAME}_scales": torch.ones(18)}), "scales must be None beside"),
        (lambda t: t.pop(f"{NAME}_values"), "describes its tensors wrongly .*_values"),
        (lambda t: t.pop("rnn.bias_ih_l0"), "describes its tensors wrongly .*bias_ih_l0"),
        (lambda t: t.update({"rnn.bias_ih_l0": torch.zeros(17)}), r"bias_ih_l0 is torch.float32 of shape \(17,\)"),
        (lambda t: t.update({"rnn.bias_ih_l0": torch.zeros(18).double()}), "bias_ih_l0 is torch.float64"),
        (lambda t: t.update({"stack.0.weight_hr_l0": torch.zeros(3, 4)}), "weight_hr_l0 must be a BlockMatrix"),
        (
            lambda t: t.update({"rnn.weight_ih_l0": torch.zeros(18, 4)}),
            "with rnn.weight_ih_l0_columns, .*, which the mo",
        ),
        (lambda t: t.update({NAME: torch.zeros(18, 6)}), "weight_hh_l1 must be a BlockMatrix"),
        (lambda t: t.update({"rnn.more": torch.zeros(1)}), "with rnn.more, which the model does not have"),
    ],
)
def test_forged_tensors_are_refused(tmp_path, change, message):
    prepare(tmp_path / "file")
    forge(tmp_path / "file", change)
    assert_refused(tmp_path / "file", message)


@pytest.mark.parametrize("block_size", [(10**9, 1), (1, 10**9), (4097, 1)])
@pytest.mark.parametrize("backend", [None, "cpu"])
def test_blocks_larger_than_their_matrix_and_none_stored_are_refused(tmp_path, block_size, backend):
    """A file of 3 KB, of which the first call took gigabytes."""
    BR, BC = block_size
    save_sparse(to_sparse(make_gru(), storage=(2, 1)), tmp_path / "file")

    def enlarge(tensors):
        tensors["weight_hh_l0_values"] = torch.empty(0, BC, BR)
        tensors["weight_hh_l0_columns"] = torch.empty(0, dtype=torch.int32)
        tensors["weight_hh_l0_starts"] = torch.zeros(4, dtype=torch.int32)

    forge(tmp_path / "file", enlarge)
    model = make_gru(1) if backend is None else to_sparse(make_gru(1), storage=(2, 1), backend=backend)
    assert_refused(tmp_path / "file", r"blocks must be at most \(4096, 4096\) for a matrix of 6 x 6, got", model)


@pytest.mark.parametrize(
    "change",
    [
        lambda modules: modules["rnn"].pop("class"),
        lambda modules: modules["rnn"].update({"class": "Linear"}),
        lambda modules: modules["rnn"].update(config=3),
        lambda modules: modules["rnn"].pop("dtype"),
        lambda modules: modules["rnn"].update(dtype="load"),
        lambda modules: modules["rnn"]["config"].update(width=3),
        lambda modules: modules["rnn"]["config"].update(weight_ih_l0=3),
        lambda modules: modules["rnn"]["config"].update(weight_ih_l0=[[1.0]]),
        lambda modules: modules["rnn"]["config"].update(forward=3),
        lambda modules: modules["rnn"]["config"].update(__class__="x"),
        lambda modules: modules["rnn"]["config"].pop("mode"),
        lambda modules: modules["rnn"]["config"].update(bias=None),
        lambda modules: modules["rnn"]["config"].update(hidden_size="6"),
        lambda modules: modules["rnn"]["config"].update(hidden_size=[6]),
        lambda modules: modules["rnn"]["config"].update(hidden_size=10**12),
        lambda modules: modules["rnn"]["config"].update(batch_first=False),
        lambda modules: modules["rnn"].pop("config"),
        lambda modules: modules["rnn"].pop("activation_dtype"),
        lambda modules: modules["rnn"].update(activation_dtype="int8"),  # its weights are not
        lambda modules: modules["rnn"].update(activation_dtype="float16"),
        lambda modules: modules["rnn"].update(activation_dtype=[]),
        lambda modules: modules.update(rnn=None),
        lambda modules: modules.pop("rnn"),
    ],
)
def test_a_forged_description_is_refused(tmp_path, change):
    prepare(tmp_path / "file")
    forge(tmp_path / "file", lambda tensors: None, change)
    assert_refused(tmp_path / "file", "describes its tensors wrongly|holds")
