"""Single steps of torch.nn, which are neither trained nor converted here: what to say of them."""

from torch import nn
from torch.nn import RNNCellBase

from triton_sparse_rnn.names import clean_name

CELL_ADVICE = (
    "put an nn.RNN, nn.GRU or nn.LSTM of one layer in the place of a cell: it has the same weights, as weight_ih_l0 "
    "and so on, and once converted step() advances it by one step"
)


def describe_cells(model: nn.Module) -> list[str]:
    """Name every nn.RNNCell, nn.GRUCell and nn.LSTMCell of a model.

    >>> describe_cells(nn.ModuleDict({"decoder": nn.GRUCell(4, 8)}))
    ["'decoder' is a GRUCell, a single step without a sparse form"]
    """
    return [
        f"'{clean_name(name)}' is a {type(module).__name__}, a single step without a sparse form"
        for name, module in model.named_modules()
        if isinstance(module, RNNCellBase)
    ]
