import dataclasses
import signal

import pytest
import torch

from triton_sparse_rnn.demo.settings import PATTERNS, QUICK, Settings
from triton_sparse_rnn.demo.text import Text
from triton_sparse_rnn.demo.training import Training, build_pruner, cut_into_streams, learning_rate, train
from triton_sparse_rnn.sparse.patterns import Blocks, Pattern
from triton_sparse_rnn.sparse.picks import Picks


def nothing() -> None:
    pass


def finished(kind: str, settings: Settings, text: Text) -> Training:
    training = Training(kind, settings, text)
    train(training, save=nothing, on_step=nothing)
    return training


def test_both_models_start_from_the_same_weights_and_see_the_same_text(tiny: Settings, text: Text):
    sparse, dense = (Training(kind, tiny, text) for kind in ("picks", "dense"))
    for ours, theirs in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for training in (sparse, dense):
        training.step()
    assert sparse.losses == dense.losses


@pytest.mark.parametrize("kind", ["picks", "blocks"])
def test_sparse_model_reaches_the_forecast_and_dense_one_stays_dense(tiny: Settings, text: Text, kind: str):
    sparse, dense = (finished(one, tiny, text) for one in (kind, "dense"))
    assert sparse.pruner is not None
    assert sparse.pruner.pattern == PATTERNS[kind]
    zeros = [
        weight.eq(0).float().mean().item() for weight in (sparse.model.rnn.weight_ih_l0, sparse.model.rnn.weight_hh_l0)
    ]
    assert zeros == pytest.approx([0.9, 0.9], abs=0.1)  # blocks at the edge hold 4 rows, not 16
    assert sparse.forecast is not None
    assert sparse.sparsities[-1] == pytest.approx(sparse.forecast.sparsity, abs=0.03)
    assert sparse.sparsities == sorted(sparse.sparsities)
    assert set(dense.sparsities) == {0.0}
    assert dense.model.rnn.weight_hh_l0.ne(0).all()


@pytest.mark.parametrize("pattern", [Picks(), Blocks(16, 1)], ids=str)
@pytest.mark.parametrize("settings", [Settings(), QUICK])
def test_pruning_ends_early_enough_to_go_on_training(settings: Settings, pattern: Pattern):
    training_model = torch.nn.GRU(settings.input_size, settings.hidden_size, device="meta").to_empty(device="cpu")
    schedule = build_pruner(training_model, settings, pattern).weights[0].schedules[0]
    assert schedule is not None
    assert 0.3 * settings.steps < schedule.last_step <= 0.8 * settings.steps


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_state_dict_goes_on_to_the_bit(tiny: Settings, text: Text, kind: str, stop: int, tmp_path):
    whole = finished(kind, tiny, text)
    first = Training(kind, tiny, text)
    for _ in range(stop):
        first.step()
    torch.save(first.state_dict(), tmp_path / "state")
    second = Training(kind, tiny, text)
    second.step()  # whatever was there before is replaced
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    train(second, save=nothing, on_step=nothing)
    assert second.losses == whole.losses
    assert second.sparsities == whole.sparsities
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_streams_start_again_with_a_fresh_state(tiny: Settings, text: Text):
    settings = dataclasses.replace(tiny, steps=10)
    short = dataclasses.replace(text, train=text.train[: 3 * (2 * settings.window + 1)])  # two windows in each stream
    training = Training("dense", settings, short)
    begun = []
    training.model.rnn.register_forward_pre_hook(lambda _, arguments: begun.append(arguments[1] is None))
    for _ in range(5):
        training.step()
    assert begun == [True, False, True, False, True]


def test_streams_are_stretches_of_text_side_by_side():
    streams = cut_into_streams(torch.arange(11), 3)
    assert streams.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_learning_rate_rises_then_falls_to_nothing():
    settings = dataclasses.replace(Settings(), steps=100, warmup=0.1, learning_rate=2.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == 2.0
    assert 0 < rates[0] < 0.3
    assert 0 < rates[-1] < 0.01


def test_checkpoints_come_on_time_and_at_the_end(tiny: Settings, text: Text):
    training = Training("dense", tiny, text)
    saved = []
    train(training, save=lambda: saved.append(training.step_count), on_step=nothing)
    assert saved == [5, 10, 14]


def test_ctrl_c_finishes_the_step_and_saves(tiny: Settings, text: Text):
    training = Training("dense", tiny, text)
    saved = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(
            training,
            save=lambda: saved.append(training.step_count),
            on_step=lambda: signal.raise_signal(signal.SIGINT) if training.step_count == 3 else None,
        )
    assert saved == [3]
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_ctrl_c_does_not_wait(tiny: Settings, text: Text):
    def interrupt_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    saved = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(Training("dense", tiny, text), save=lambda: saved.append(True), on_step=interrupt_twice)
    assert saved == []
    assert signal.getsignal(signal.SIGINT) is handler
