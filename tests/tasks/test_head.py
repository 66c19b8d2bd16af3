"""Dropout before the classifier."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from dia_lightning.models import get_model
from dia_lightning.tasks._head import DropoutLinear, drop_before_head


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("cifar_resnet", "fc", {"depth": 11}),
        ("torchvision/resnet18", "fc", {}),
        ("torchvision/efficientnet_b0", "classifier.1", {"dropout": 0.0, "stochastic_depth_prob": 0.0}),
        ("timm/vit_tiny_patch16_224", "head", {"img_size": 32}),
    ],
)
def test_values_before_the_classifier_are_dropped_in_training_only(
    name: str, head: str, options: dict[str, float]
) -> None:
    network = get_model(name, num_classes=7, **options)
    keys, layer = list(network.state_dict()), network.get_submodule(head)
    plain = copy.deepcopy(network)
    drop_before_head(network, 7, 0.5)
    assert network.get_submodule(head) is layer
    assert list(network.state_dict()) == keys
    images = torch.randn(4, 3, 32, 32)
    for copied in (network, pickle.loads(pickle.dumps(copy.deepcopy(network.eval())))):
        torch.testing.assert_close(copied(images), plain.eval()(images))
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.train()
    torch.manual_seed(0)
    logits = network(images)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    torch.manual_seed(0)
    torch.testing.assert_close(logits, F.linear(F.dropout(seen[-1], 0.5), weight, bias))


def test_a_distilled_network_drops_before_both_of_its_classifiers() -> None:
    network = get_model("timm/deit_tiny_distilled_patch16_224", num_classes=7, img_size=32)
    drop_before_head(network, 7, 0.5)
    assert isinstance(network.head, DropoutLinear)
    assert isinstance(network.head_dist, DropoutLinear)


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last layer is linear with 7 output.*SqueezeNet is Conv2d.*backbone_args"):
        drop_before_head(get_model("torchvision/squeezenet1_1", num_classes=7), 7, 0.1)
    with pytest.raises(ValueError, match="with 3 output"):
        drop_before_head(get_model("cifar_resnet", depth=11, num_classes=7), 3, 0.1)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        drop_before_head(get_model("cifar_resnet", depth=11, num_classes=7), 7, 1.0)
