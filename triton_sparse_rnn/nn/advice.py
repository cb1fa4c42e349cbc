"""What a user is told of a layer that gains little by its conversion, and what would help."""

from __future__ import annotations

from torch import Tensor

from triton_sparse_rnn.nn.storage_choice import pattern_to_prune_in
from triton_sparse_rnn.notices import in_layer, warn
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks

NOT_PRUNED_ABOVE = 0.95  # the fraction of stored units above which a product counts as dense
FEW_COLUMNS = 1 / 16  # of H: a weight_ih so narrow may well be left dense, and nothing is said of it
LITTLE_TO_SKIP_ABOVE = 0.5  # the fraction of stored blocks above which a user is told so
# The fraction of zeros from which a GRU layer on the CPU is faster than another engine: {engine: {H: fraction}}.
# Measured by bench/cpu/bench_break_even.py; 0 is the lowest that was.
BREAK_EVEN_ZEROS = {
    "nn.GRU": {256: 0.0, 512: 0.0, 1024: 0.0, 2048: 0.0},
    "onnxruntime, the best of the others in float32,": {256: 0.0, 512: 0.03, 1024: 0.26, 2048: 0.04},
}
BREAK_EVEN_MACHINE = "one thread, batch 1, AMD Zen 4"


def is_often_dense(name: str, weight: Tensor, hidden_size: int) -> bool:
    """Whether a weight is one that users leave dense on purpose: a narrow weight_ih, or a weight_hr.

    A Pruner prunes weight_hr only if `include` names it.
    """
    few_columns = name.startswith("weight_ih") and weight.shape[1] <= hidden_size * FEW_COLUMNS
    return few_columns or name.startswith("weight_hr")


def warn_if_dense(
    name: str,
    weight: Tensor,
    pattern: Pattern,
    density: float,
    *,
    gates: int = 1,
    kept_dense: bool = False,
    named: Pattern | None = None,
    backend: str | None = None,
    recurrent: bool = True,
) -> None:
    """Say so when there is little to skip in a weight, and what would help.

    Args:
        name: of the weight.
        weight: [G * H, columns].
        pattern: in which it is stored, or would be.
        density: the fraction of its units that hold anything but zeros.
        gates: G.
        kept_dense: whether it stays an ordinary matrix.
        named: the pattern that the user named, None for what runs well there.
        backend: with which the layer is to run.
        recurrent: whether it is a weight of a recurrent layer, for which the break-even was measured.
    """
    if density <= LITTLE_TO_SKIP_ABOVE:
        return
    zeros = weight.eq(0).float().mean().item()
    consequence = "runs as a dense product" if density > NOT_PRUNED_ABOVE else "gains little"
    consequence = "stays dense and runs as a dense matrix product" if kept_dense else consequence
    found = "" if zeros <= 1 - LITTLE_TO_SKIP_ABOVE else "its zeros are not where they can be skipped: "
    finest = pattern_to_prune_in(weight.device, backend)
    advice = f"prune it first, with pattern={named or finest}"
    if found and finest.kept(weight.unflatten(0, (gates, -1))).double().mean() <= LITTLE_TO_SKIP_ABOVE:
        if named is None:  # what it is stored in was faster by the estimate, as 16x4 blocks of int8 are
            found, advice = "", "to skip its zeros would take longer: prune more of it"
        elif isinstance(named, Blocks) and isinstance(finest, Picks):
            advice = "leave out storage, and it is stored in picks"
    measured = "" if weight.is_cuda or not recurrent else f" ({break_even_text()})"
    warn(
        f"{in_layer(name)} is {zeros:.0%} zeros and {density:.0%} of the units of {pattern} hold other weights, so "
        f"there is little to skip and it {consequence}; {found}{advice}.{measured}"
    )


def break_even_text() -> str:
    """Return BREAK_EVEN_ZEROS as a sentence."""
    engines = (
        f"with {engine} at " + ", ".join(f"{zeros:.0%} zeros for H {H}" for H, zeros in by_size.items())
        for engine, by_size in BREAK_EVEN_ZEROS.items()
    )
    return f"A GRU layer on the CPU breaks even {'; '.join(engines)}: {BREAK_EVEN_MACHINE}."


def warn_if_slow(backend: str, reason: str | None) -> None:
    """Say so when a layer gets no kernel of its own.

    Args:
        backend: the fast one of the device.
        reason: why it cannot run the layer.
    """
    layer = f"layer {path!r}" if (path := in_layer("")) else "the layer"
    warn(
        f"{layer} will run on backend 'reference', plain torch, and slower than torch.nn: backend {backend!r} cannot "
        f"run it because {reason}. backend='reference' asks for this and says nothing"
    )
