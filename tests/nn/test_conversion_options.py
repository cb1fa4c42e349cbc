import inspect

import pytest
from torch import nn

from triton_sparse_rnn import PersistentGRU, SparseGRU, SparseLSTM, SparseRNN, to_sparse
from triton_sparse_rnn.nn.conversion_options import DEFAULTS, ConversionOptions

FUNCTIONS = [to_sparse, PersistentGRU.from_dense, SparseRNN.to_sparse, SparseGRU.to_sparse, SparseLSTM.to_sparse]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_a_signature_shows_each_option(function):
    others = ("filter_fn", "include")  # of to_sparse, which layers it takes
    options = [o for o in list(inspect.signature(function).parameters.values())[1:] if o.name not in others]
    assert {option.name: option.default for option in options} == DEFAULTS
    assert list(ConversionOptions.__annotations__) == list(DEFAULTS)
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    assert str(options[-1]) == "num_threads: 'int' = 1"
    assert all(option.name in inspect.getdoc(PersistentGRU.from_dense) for option in options)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (lambda **wrong: to_sparse(nn.GRU(2, 3), **wrong), "to_sparse"),
        (lambda **wrong: to_sparse(nn.Linear(2, 3), **wrong), "to_sparse"),
        (lambda **wrong: PersistentGRU.from_dense(nn.GRU(2, 3), **wrong), "PersistentGRU.from_dense"),
        (lambda **wrong: SparseGRU(2, 3).to_sparse(**wrong), "PersistentGRU.from_dense"),
    ],
)
def test_an_unknown_option_is_named_with_those_that_there_are(convert, name):
    message = rf"{name}\(\) got an unexpected keyword argument 'block_size'; its options are weight_dtype, storage, "
    with pytest.raises(TypeError, match=message):
        convert(block_size=(16, 1))
