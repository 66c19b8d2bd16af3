"""The file of weights that FID needs, without its download."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as network

from dia_lightning.tasks.image_features import InceptionFeatures


def write_inception_weights(path: Path) -> Path:
    """Write a file as torch-fidelity's, with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("dia_lightning.tasks.image_features._fetched", lambda _: path)
        patch.setattr("dia_lightning.tasks.image_features._check_holds_weights_only", lambda _: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        judge = InceptionFeatures()
    torch.manual_seed(0)
    for module in judge.modules():
        if isinstance(module, nn.Conv2d):  # the usual start makes features that are nearly nothing
            nn.init.kaiming_normal_(module.weight)
    torch.save(judge.network.state_dict(), path)
    return path
