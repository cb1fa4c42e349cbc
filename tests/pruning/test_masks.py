import math

import pytest
import torch

from triton_sparse_rnn.pruning.masks import kept_bits, pack_bits, unpack_bits, zero_pruned

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_touches_pruned_entries_only(dtype):
    mask = torch.tensor([[True, True, False]] * 3 + [[False, False, True]] * 3)
    bits = kept_bits(mask, dtype)
    assert torch.equal(bits.ne(0), mask)
    values = torch.tensor([1.5, -0.0, math.inf, -math.inf, math.nan, 6e-8], dtype=dtype).repeat(3).view(6, 3)
    zeroed = values.clone()
    zero_pruned(zeroed, bits)
    assert torch.equal(zeroed.nan_to_num(77), values.masked_fill(~mask, 0.0).nan_to_num(77))
    assert torch.equal(zeroed.signbit(), values.signbit() & mask)


def test_zeroing_takes_parameters_other_dtypes_and_strides():
    bits = kept_bits(torch.tensor([[True, False]] * 5), torch.bfloat16)
    parameter = torch.nn.Parameter(torch.ones(5, 2))
    strided = torch.ones(2, 10, dtype=torch.float64).t()[::2]
    for tensor in (parameter, strided):
        zero_pruned(tensor, bits)
        assert tensor.tolist() == [[1, 0]] * 5
    assert parameter.requires_grad


@pytest.mark.parametrize("count", range(18))
def test_packed_bits_come_back(count):
    mask = torch.rand(count) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count // 8)
    assert torch.equal(unpack_bits(packed, (count,)), mask)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), "expected uint8 \\[1\\] for 6 units, got torch.uint8 \\[2\\]"),
        (torch.zeros(1, dtype=torch.int8), "got torch.int8"),
        (torch.zeros(1, 1, dtype=torch.uint8), "got torch.uint8 \\[1, 1\\]"),
        ([0], "got list"),
        (torch.tensor([64], dtype=torch.uint8), "bits are set beyond the 6 units"),
    ],
)
def test_damaged_bits_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        unpack_bits(packed, (2, 3))
