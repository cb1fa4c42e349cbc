import math

import pytest
import torch

from triton_sparse_rnn.pruning import divergence


@pytest.mark.parametrize("temperature", [0.5, 1, 2.0, 10.0])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 5)])
def test_divergence_is_that_of_softened_distributions(shape, temperature):
    scores, taught = torch.randn(2, *shape, dtype=torch.float64)
    scores.requires_grad_()
    p, q = ((one.detach() / temperature).softmax(-1) for one in (taught, scores))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    loss = divergence(scores, taught.requires_grad_(), temperature)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    torch.testing.assert_close(scores.grad, temperature * (q - p) / max(1, p[..., 0].numel()))
    assert taught.grad is None


def test_divergence_in_half_precision_and_with_classes_ruled_out():
    scores, taught = torch.randn(2, 3, 5)
    loss = divergence(scores.bfloat16(), taught.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, divergence(scores.bfloat16().float(), taught.half().float()))
    few = divergence(scores[:, :3], taught[:, :3])
    scores, taught = (one.index_fill(1, torch.tensor([3, 4]), -math.inf).requires_grad_() for one in (scores, taught))
    loss = divergence(scores, taught)
    torch.testing.assert_close(loss, few)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    with torch.inference_mode():
        taught = torch.randn(3, 5)
    divergence(torch.randn(3, 5, requires_grad=True), taught, temperature=1.0).backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], torch.ones(1)), "scores must be a tensor, got list"),
        ((torch.ones(1), {"logits": 1}), "taught must be a tensor, got dict"),
        ((torch.ones(2), torch.ones(2), "2"), "temperature must be a number above 0, got '2'"),
        ((torch.ones(2), torch.ones(2, dtype=torch.long)), "taught must be floating-point scores .* got torch.int64"),
    ],
)
def test_wrong_types_of_scores(arguments, message):
    with pytest.raises(TypeError, match=message):
        divergence(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(3)), r"of one shape \[\.\.\., classes\], got \(2, 3\) and \(3,\)"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "one shape"),
        *(
            ((torch.ones(2), torch.ones(2), T), "temperature must be a number above 0")
            for T in (0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_wrong_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)
