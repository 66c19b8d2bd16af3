"""The file of weights that FID needs, without its download."""

from pathlib import Path

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as network

from dia_lightning.tasks.image_features import InceptionFeatures


def write_inception_weights(path: Path) -> Path:
    """Write a file as torch-fidelity's, with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(network.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(InceptionFeatures().network.state_dict(), path)
    return path
