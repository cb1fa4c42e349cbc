"""Small optimizers and averages that do what others' packages do to the weights, for the tests beside this file."""

from typing import Any

import torch
from torch.optim import Optimizer


class Sam(Optimizer):
    """Sharpness-aware: climbs in `first_step`, goes back in `second_step`, and lets another optimizer step there."""

    def __init__(self, parameters, base=torch.optim.SGD, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def _parameters(self):
        return [each for group in self.param_groups for each in group["params"] if each.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([each.grad.norm() for each in self._parameters()]).norm() + 1e-12
        for each in self._parameters():
            self.state[each]["old"] = each.detach().clone()
            each.add_(each.grad * self.defaults["rho"] / norm)

    @torch.no_grad()
    def second_step(self):
        for each in self._parameters():
            each.data = self.state[each]["old"]
        self.base_optimizer.step()

    def step(self, closure=None):
        assert closure is not None
        self.first_step()
        self.zero_grad()
        loss = torch.enable_grad()(closure)()
        self.second_step()
        return loss


class SamAlone(Optimizer):
    """Sharpness-aware without an optimizer inside: its two calls write by `.data`, and nobody calls `step`."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    def _move(self, by):
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["moved"] = by * each.grad
                each.data.add_(self.state[each]["moved"])

    def first_step(self):
        self._move(0.05)

    def second_step(self):
        for group in self.param_groups:
            for each in group["params"]:
                each.data.sub_(self.state[each]["moved"])
        self._move(-self.defaults["lr"])

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


class SteppingBySuper(torch.optim.Adam):
    """Hands its step on to a class whose step calls hooks as well, once torch has seen an object of it."""

    fails = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.fails:
            raise ZeroDivisionError
        return loss


class Switching(Optimizer):
    """Starts with one optimizer and goes on with another, or takes turns; both have all parameters."""

    def __init__(self, parameters, turns):
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.first = torch.optim.Adam(parameters, lr=0.01)
        self.second = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.turns, self.steps = turns, 0

    def step(self, closure: Any = None) -> Any:
        for each in self.turns(self.steps, self.first, self.second):
            each.step()
        self.steps += 1


class Lookahead(Optimizer):
    """Every k steps the weights go back half of the way; as in several packages, `Optimizer.__init__` never runs."""

    def __init__(self, optimizer, k=3):
        self.optimizer, self.k, self.steps = optimizer, k, 0
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self.slow = {each: each.detach().clone() for group in self.param_groups for each in group["params"]}

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            for each, slow in self.slow.items():
                slow.add_(each.data - slow, alpha=0.5)
                each.data.copy_(slow)
        return loss


class HookedLookahead(Lookahead):
    """The same by the rules of torch: hooks can be registered in it, and its slow weights lie in a state of its own."""

    def __init__(self, optimizer, k=3):
        Optimizer.__init__(self, optimizer.param_groups, {})
        self.optimizer, self.k, self.steps = optimizer, k, 0
        self.param_groups = optimizer.param_groups
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["slow"] = each.detach().clone()

    @property
    def slow(self):
        return {each: self.state[each]["slow"] for group in self.param_groups for each in group["params"]}


class Plain:
    """A wrapper that is no subclass of Optimizer, like those for mixed precision."""

    def __init__(self, optimizer):
        self.optim = optimizer

    @property
    def param_groups(self):
        return self.optim.param_groups

    def zero_grad(self):
        self.optim.zero_grad()

    def step(self):
        self.optim.step()


class Several(Optimizer):
    """Steps several optimizers, each of which has a part of the parameters."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return [group for each in self.optimizers for group in each.param_groups]

    def step(self, closure: Any = None) -> Any:
        for each in self.optimizers:
            each.step()


class Average:
    """An exponential moving average that is copied into the model, past what counts the versions of a tensor."""

    def __init__(self, model):
        self.model, self.kept = model, [each.detach().clone() for each in model.parameters()]

    def update(self):
        for kept, each in zip(self.kept, self.model.parameters(), strict=True):
            kept.lerp_(each.detach(), 0.1)

    def copy_to_model(self):
        for kept, each in zip(self.kept, self.model.parameters(), strict=True):
            each.data.copy_(kept)
