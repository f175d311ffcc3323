"""A module run with other weights, and left as it was."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from clplat.learners.nets.gated import hgrn
from clplat.learners.nets.heads import Head
from clplat.streams.experience import Batch
from clplat.streams.inputs import Inputs
from clplat.weights import functional


class Twice(nn.Module):
    """x times a weight, twice: by one module in two places, or by two modules that share the weight."""

    def __init__(self, one_module: bool) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = self.first if one_module else nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("one_module", [True, False])
def test_a_weight_in_two_places_is_replaced_in_both_and_comes_back(one_module: bool) -> None:
    module = Twice(one_module)
    weight = module.first.weight
    y = functional.call(module, {"first.weight": torch.full((1, 1), 3.0)}, torch.ones(1, 1))
    assert y.item() == 9.0
    assert module.first.weight is weight
    assert module.second.weight is weight
    assert list(module.parameters()) == [weight]


def test_gradients_reach_what_was_given() -> None:
    module, given = Twice(True), torch.full((1, 1), 3.0, requires_grad=True)
    functional.call(module, {"second.weight": given}, torch.ones(1, 1)).backward()
    assert given.grad is not None
    assert given.grad.item() == 6.0
    assert module.first.weight.grad is None


def test_layers_that_share_their_bounds() -> None:
    """HGRN: torch's own `functional_call` would leave the tensor that was given in the place of the parameter."""
    net = hgrn(Inputs(features=3, length=4), partial(Head, outputs=2), hidden=8, layers=2)
    before = dict(net.named_parameters())
    other = {name: torch.randn_like(p) for name, p in before.items()}
    batch = Batch(torch.randn(2, 4, 3), torch.zeros(2, dtype=torch.int64))
    found = functional.call(net, other, batch).logits
    assert [p is before[name] for name, p in net.named_parameters()] == [True] * len(before)
    net.load_state_dict(other, strict=False)
    torch.testing.assert_close(found, net(batch).logits)


def test_a_name_that_is_no_parameter_is_refused() -> None:
    with pytest.raises(KeyError, match="third"):
        functional.call(Twice(True), {"third.weight": torch.ones(1, 1)}, torch.ones(1, 1))
