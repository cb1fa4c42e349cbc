from typing import cast

import pytest
import torch

from triton_sparse_rnn import SparseGRU
from triton_sparse_rnn.conversion import to_sparse
from triton_sparse_rnn.demo.generation import draw_noise, generate, step_of, time_streams
from triton_sparse_rnn.demo.model import CharacterModel, build_model


@pytest.fixture
def model() -> CharacterModel:
    model = build_model(SparseGRU, 6, 5, 20, seed=1).eval()
    for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
        torch.nn.init.normal_(weight)
        weight.data[:, torch.arange(weight.shape[1]) % 5 > 0] = 0
    torch.nn.init.normal_(model.decoder.weight)
    return model


def test_noise_draws_from_softmax_and_never_other():
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5, 9.0])
    drawn = (scores + draw_noise(20_000, 5, seed=0)).argmax(1)
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    assert torch.allclose(shares[:4], scores[:4].softmax(0), atol=0.02)
    assert shares[4] == 0


def test_stream_is_what_whole_calls_say(model: CharacterModel):
    prompt, noise = torch.tensor([1, 4, 2]), draw_noise(30, 6, seed=5)
    drawn = generate(model, prompt, noise)
    with torch.inference_mode():
        scores, _ = model(torch.cat([prompt, torch.tensor(drawn[:-1])])[:, None])
    assert drawn == (scores[len(prompt) - 1 :, 0] + noise).argmax(1).tolist()


def test_converted_model_writes_the_same_text(model: CharacterModel):
    prompt, noise = torch.tensor([3]), draw_noise(200, 6, seed=2)
    seen, converted = [], cast(CharacterModel, to_sparse(model))
    assert generate(converted, prompt, noise, on_symbol=seen.append) == generate(model, prompt, noise) == seen


def test_low_temperature_takes_the_best(model: CharacterModel):
    noises = [draw_noise(20, 6, seed=seed) for seed in (0, 1)]
    for noise in noises:
        noise[:, -1] = 0
    texts = [generate(model, torch.tensor([0]), noise, temperature=1e-6) for noise in noises]
    assert texts[0] == texts[1]


def test_one_step_of_a_dense_layer():
    layer = torch.nn.GRU(3, 4)
    x = torch.randn(1, 3)
    y, h = step_of(layer)(x, None)
    assert y.shape == (1, 4)
    assert h.shape == (1, 1, 4)
    assert torch.equal(y, layer(x[None])[0][0])


def test_times_are_positive_and_threads_are_put_back(model: CharacterModel):
    threads = torch.get_num_threads()
    models = {"a": model, "b": cast(CharacterModel, to_sparse(model))}
    times = time_streams(models, torch.tensor([1]), draw_noise(5, 6, seed=0), rounds=2)
    assert torch.get_num_threads() == threads
    assert set(times) == {"a", "b"}
    assert all(time.loop_us > 0 and time.layer_us > 0 for time in times.values())
