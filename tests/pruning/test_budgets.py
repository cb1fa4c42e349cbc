import math
import random

import pytest
import torch

from triton_sparse_rnn.pruning import budgets
from triton_sparse_rnn.pruning.budgets import check_split, least_kept, root_mean_square, scheduled, share_out


def shared_by_hand(scores, kept, sparsity):
    """How many units each part keeps, by lists: its floor, then the best of all others, later ones first if equal."""
    left = [
        sorted((s for s, k in zip(*each, strict=True) if k), reverse=True) for each in zip(scores, kept, strict=True)
    ]
    sizes = [len(each) for each in scores]
    floors = [min(size, max(1, math.ceil((1 - sparsity) * size / 4 - 1e-9))) for size in sizes]
    counts = [min(len(each), floor) for each, floor in zip(left, floors, strict=True)]
    others = [(score, part) for part, each in enumerate(left) for score in each[counts[part] :]]
    wanted = sum(sizes) - round(sparsity * sum(sizes)) - sum(counts)
    for _, part in sorted(others, reverse=True)[: max(0, wanted)]:
        counts[part] += 1
    return counts


@pytest.mark.parametrize("sizes", [(1,), (5, 3), (40, 40, 40, 7, 7, 7), (0, 9, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("equal", [False, True])
def test_a_floor_each_and_then_the_best_of_all(sizes, sparsity, equal):
    draw = random.Random(repr((sizes, sparsity)))
    for attempt in range(10):
        scores = [
            [draw.randrange(4 if equal else 10**9) * (1.0 + 9 * part) for _ in range(size)]
            for part, size in enumerate(sizes)
        ]
        kept = [[draw.random() < 0.7 or attempt < 5 for _ in each] for each in scores]
        shares = share_out(
            [torch.tensor(each).view(1, -1) for each in scores],
            [torch.tensor(each, dtype=torch.bool).view(1, -1) for each in kept],
            sparsity,
        )
        counts = [size - round(share * size) for share, size in zip(shares, sizes, strict=True)]
        assert counts == shared_by_hand(scores, kept, sparsity)
        assert all(count <= sum(each) for count, each in zip(counts, kept, strict=True))
        floors = sum(least_kept(size, sparsity) for size in sizes)
        if attempt < 5:
            assert sum(counts) == max(floors, scheduled(sizes, sparsity))


def test_a_low_part_keeps_its_floor_and_no_more(monkeypatch):
    kept = [torch.ones(1, 40, dtype=torch.bool)] * 3
    scores = [torch.full((1, 40), 0.0), torch.arange(40.0).view(1, 40), torch.arange(0.5, 40).view(1, 40)]
    assert share_out(scores, kept, 0.9) == pytest.approx([39 / 40, 35 / 40, 34 / 40])
    monkeypatch.setattr(budgets, "FLOOR", 0.5)
    assert share_out(scores, kept, 0.9) == pytest.approx([38 / 40, 35 / 40, 35 / 40])
    monkeypatch.setattr(budgets, "FLOOR", 0.0)
    assert share_out(scores, kept, 0.9) == pytest.approx([39 / 40, 35 / 40, 34 / 40])  # one is the least there is


def test_what_is_pruned_stays_so_however_high_it_scores():
    kept = [torch.tensor([[True, False, False, True]]), torch.ones(1, 4, dtype=torch.bool)]
    scores = [torch.tensor([[5.0, 9.0, 9.0, 6.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])]
    assert share_out(scores, kept, 0.5) == [0.5, 0.5]
    assert share_out(scores, kept, 0.25) == [0.5, 0.0]
    assert share_out(scores, kept, 0.0) == [0.5, 0.0]  # less than was pruned brings nothing back


def test_an_infinite_score_does_not_take_the_floor_of_others():
    kept = [torch.ones(1, 4, dtype=torch.bool)] * 2
    scores = [torch.full((1, 4), torch.inf), torch.tensor([[1.0, 2.0, 3.0, 4.0]])]
    assert share_out(scores, kept, 0.5) == [0.25, 0.75]


def test_rows_lose_equally_many_and_are_ranked_by_the_mean_of_their_places():
    first = torch.tensor([[9.0, 0.0, 8.0], [1.0, 3.0, 0.0]])  # by place 6, 4.5, 0
    second = torch.tensor([[5.0, 1.0, 4.0], [1.0, 5.0, 5.0]])  # 5, 4.5, 1
    kept = [torch.ones(2, 3, dtype=torch.bool)] * 2
    assert share_out([first, second], kept, 0.5) == pytest.approx([2 / 3, 1 / 3])
    kept[1] = torch.tensor([[True, False, True], [False, True, True]])
    assert share_out([first, second - 3 * kept[1]], kept, 1 / 3) == pytest.approx([1 / 3, 1 / 3])
    assert share_out([first, second], kept, 1 / 6) == pytest.approx([0, 1 / 3])


@pytest.mark.parametrize("units", [*range(1, 40), 399, 400, 4001])
def test_floors_are_rounded_up(units):
    for percent in (0, 10, 50, 80, 90, 97):
        exactly = (100 - percent) * units
        assert least_kept(units, percent / 100) == max(1, -(-exactly // 400))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (6, 3, 2), (300, 1)], ids=str)
def test_root_mean_square_is_of_all_entries(dtype, shape):
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight.view(-1)[::3] = 0
    before = weight.clone()
    result = root_mean_square(weight)
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(weight.double().square().mean().sqrt().item())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_root_mean_square_at_the_ends_of_float64(scale):
    assert root_mean_square(torch.tensor([[3.0, -4.0]]).double() * scale).item() == pytest.approx(scale * 12.5**0.5)


def test_root_mean_square_of_nothing_zeros_and_faults():
    assert root_mean_square(torch.zeros(3, 4)) == 0
    assert root_mean_square(torch.zeros(3, 0)) == 0
    assert root_mean_square(torch.tensor([[torch.inf, -torch.inf], [torch.nan, 2.0]])) == 1


def test_other_splits_are_refused():
    assert check_split("layer") == "layer"
    for wrong in ("Layer", None, 3):
        with pytest.raises(ValueError, match=f"split must be one of 'gate', 'layer', got {wrong!r}"):
            check_split(wrong)  # type: ignore[arg-type]
