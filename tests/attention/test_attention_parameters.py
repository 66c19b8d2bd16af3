"""The parameters that attached attention has."""

from typing import Any

import pytest
import torch
from torch import nn

from dia_lightning.attention import attach, attention_parameters, detach
from dia_lightning.models import get_model


@pytest.mark.parametrize("share", ["stage", "block"])
@pytest.mark.parametrize("attention", ["dia-lstm", "srm"])
def test_attention_parameters_are_what_attach_adds(attention: str, share: Any) -> None:
    network = get_model("cifar_resnet", depth=20, block="basic")
    plain = set(network.parameters())
    attach(network, attention, share=share)
    added = [parameter for parameter in network.parameters() if parameter not in plain]
    for model in (network, nn.DataParallel(network), torch.compile(network)):
        assert list(map(id, attention_parameters(model))) == list(map(id, added))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"No attention is attached to this network. Call attach\(network, ...\)"):
        attention_parameters(detach(network))


def test_attention_parameters_have_those_that_a_network_shares() -> None:
    network = attach(get_model("torchvision/mobilenet_v3_small"), None, existing="share")
    found = attention_parameters(network)
    shared = [module for name, module in network.named_modules() if name.endswith(".dia")]
    assert list(map(id, found)) == [id(each) for module in shared for each in module.parameters()]
    assert found
