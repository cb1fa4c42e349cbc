import fnmatch
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from triton_sparse_rnn import OneShot, Pruner, group_lasso, l1, sparsity_report
from triton_sparse_rnn.names import clean_name, clean_names

HALF = OneShot(sparsity=0.5, step=1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(4, 8)
        self.decoder = nn.Linear(8, 2)

    def forward(self, x):
        return self.decoder(self.rnn(x)[0])


def compiled(module) -> Any:
    return torch.compile(module, backend="eager")


def around_the_layer(wrapper):
    model = Model()
    model.rnn = wrapper(model.rnn)
    return model


WRAPPED = {
    "compiled": lambda: compiled(Model()),
    "compiled layer": lambda: around_the_layer(compiled),
    "checkpointed": lambda: checkpoint_wrapper(Model()),
    "checkpointed layer": lambda: around_the_layer(checkpoint_wrapper),
    "averaged": lambda: AveragedModel(Model()),
    "data parallel": lambda: nn.DataParallel(Model()),
    "all": lambda: compiled(checkpoint_wrapper(nn.DataParallel(around_the_layer(checkpoint_wrapper)))),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_are_those_of_the_model_in_its_wrappers(wrap):
    model = wrap()
    for include in (("decoder.*",), ("*",)):
        pruner = Pruner(model, HALF, pattern=(2, 1), targets={"rnn.weight_ih*": None}, include=include)
        assert [weight.name for weight in pruner.weights] == ["rnn.weight_hh_l0", "decoder.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.attach(optimizer)
    optimizer.step()
    plain = Model()
    Pruner(plain, HALF, pattern=(2, 1), targets={"rnn.weight_ih*": None}, include=("*",)).load_state_dict(
        pruner.state_dict()
    )
    report = sparsity_report(model)
    assert [weight.name for weight in report.weights] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [round(weight.density, 2) for weight in report.weights] == [1.0, 0.5]
    assert [tensor.name for tensor in report.others if fnmatch.fnmatch(tensor.name, "decoder.*")]
    assert group_lasso(model).item() > 0
    assert l1(model).item() > 0


def test_report_of_a_state_dict_of_a_wrapped_model():
    report = sparsity_report(nn.DataParallel(compiled(Model())).state_dict())
    assert [weight.name for weight in report.weights] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


def test_every_wrapper():
    wrapped = "module._orig_mod._checkpoint_wrapped_module.a._fsdp_wrapped_module._forward_module._original_module.b"
    assert clean_name(wrapped) == "a.b"
    assert clean_name("my_module.module_1.weight") == "my_module.module_1.weight"
    assert clean_name("module") == ""


def test_names_that_would_become_one_stay():
    paths = ["module.a", "a", "module.b"]
    assert clean_names(paths) == dict(zip(paths, paths, strict=True))
