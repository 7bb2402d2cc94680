"""The rule of parity itself: that it can fail, and that it runs on any device."""

import pytest
import torch

from tests.ops.parity import assert_accurate, check_parity

pytestmark = pytest.mark.any_build


def softmax(x, weight):
    return torch.softmax(x, -1) * weight, x.sum(-1)


def test_another_device_than_the_cpu():
    # The meta device stands for a GPU: autograd refuses output gradients that are not on the outputs' device.
    inputs = torch.ones(3, 4, device="meta"), torch.ones(4, device="meta")
    check_parity(softmax, softmax, softmax, inputs)
    with pytest.raises(AssertionError, match="output 1"):
        check_parity(lambda x, w: (softmax(x, w)[0], x.sum(-1).double()), softmax, softmax, inputs)


def test_what_is_not_accurate_fails():
    x, weight = torch.linspace(-2, 2, 12).view(3, 4), torch.ones(4)
    check_parity(softmax, softmax, softmax, (x, weight))
    with pytest.raises(AssertionError, match="output 0: error"):
        check_parity(lambda x, w: (softmax(x, w)[0] + 1e-5, x.sum(-1)), softmax, softmax, (x, weight))
    with pytest.raises(AssertionError, match="gradient 0: error"):
        check_parity(lambda x, w: (softmax(x, w)[0], x.detach().sum(-1) + 0 * x.sum(-1)), softmax, softmax, (x, weight))
    with pytest.raises(AssertionError, match="an input was modified"):
        check_parity(lambda x, w: softmax(x, w.detach().add_(1) and w), softmax, softmax, (x, weight[:1]))


def test_a_result_on_another_device_is_wrong():
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="output"):
        assert_accurate("output", x.to("meta"), x, x.double())
