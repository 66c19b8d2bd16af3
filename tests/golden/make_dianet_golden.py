"""Makes the golden files of this folder with the authors' code.

    git clone https://github.com/gbup-group/DIANet && python -m tests.golden.make_dianet_golden DIANet

Logits, loss and gradients are computed in float64. Of each gradient its norm and one random projection are kept, of a
few small ones every value.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.golden import deterministic_weights

# name -> file and class in models/cifar, and the arguments
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet11": ("dia_resnet", "ResNet", {"depth": 11, "num_classes": 10, "block_name": "Bottleneck"}),
    "resnet20": ("dia_resnet", "ResNet", {"depth": 20, "num_classes": 7, "block_name": "Bottleneck"}),
    "preresnet11": ("dia_preresnet", "PreResNet", {"depth": 11, "num_classes": 10, "block_name": "Bottleneck"}),
    "preresnet20": ("dia_preresnet", "PreResNet", {"depth": 20, "num_classes": 7, "block_name": "Bottleneck"}),
    "wrn10_4": ("dia_wrn", "WideResNet", {"depth": 10, "num_classes": 10, "widen_factor": 4}),
    "wrn16_4": ("dia_wrn", "WideResNet", {"depth": 16, "num_classes": 7, "widen_factor": 4}),
    "resnext11_8x32": ("dia_resnext", "CifarResNeXt", {"depth": 11, "num_classes": 10, "cardinality": 8}),
    "resnext20_2x32": ("dia_resnext", "CifarResNeXt", {"depth": 20, "num_classes": 7, "cardinality": 2}),
}
WHOLE = ("bn1.bias", "bn_1.bias", "1.lstm.w_ih.0.seq.0.bias", "3.lstm.w_hh.0.seq.0.bias", "fc.bias", "classifier.bias")


def main(clone: Path, folder: Path) -> None:
    """Writes one file per network."""
    torch.Tensor.cuda = lambda self: self  # type: ignore[assignment,method-assign,misc]  # the code asks for a GPU
    torch.set_default_dtype(torch.float64)  # of the zero states that the code makes
    for name, (file, network, options) in NETWORKS.items():
        model: nn.Module = getattr(_module(clone / "models" / "cifar" / f"{file}.py"), network)(**options)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict(deterministic_weights.state_dict(shapes))
        golden = {"shapes": np.array(json.dumps(shapes)), "options": np.array(json.dumps(options)), **_results(model)}
        np.savez_compressed(folder / f"dianet_{name}.npz", **golden)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _results(model: nn.Module) -> dict[str, Any]:
    images = deterministic_weights.images().double()
    eval_logits = model.eval()(images)
    train_logits = model.train()(images)
    labels = torch.arange(len(images)) % train_logits.shape[1]
    loss = nn.functional.cross_entropy(train_logits, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {
        "eval_logits": eval_logits.detach().numpy(),
        "train_logits": train_logits.detach().numpy(),
        "train_loss": loss.detach().numpy(),
        "eval_logits_after_training_step": model.eval()(images).detach().numpy(),
        "gradient_names": np.array(list(gradients)),
        "gradient_norms": np.array([float(g.norm()) for g in gradients.values()]),
        "gradient_probes": np.array([deterministic_weights.probe(n, g) for n, g in gradients.items()]),
        **{f"gradient/{name}": g.numpy() for name, g in gradients.items() if name.endswith(WHOLE)},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
