"""Values of parameters that are spread over processes."""

import torch

from blip2_hf.training.whole_parameters import whole_value


def test_plain_parameters() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    value = whole_value(parameter)
    assert torch.equal(value, torch.ones(2)) and not value.requires_grad


def test_sharded_parameters() -> None:
    """A DTensor, which is what FSDP2 makes of a parameter, tells its whole value by `full_tensor`."""

    class Sharded(torch.nn.Parameter):
        def full_tensor(self) -> torch.Tensor:
            return torch.arange(4.0, requires_grad=True)

    value = whole_value(Sharded(torch.zeros(2)))
    assert value.tolist() == [0, 1, 2, 3] and not value.requires_grad
