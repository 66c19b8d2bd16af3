"""Attention and models need only torch and torchvision; everything else states in one line which extra to install."""

import subprocess
import sys

BLOCKED = (
    *("accelerate", "diffusers", "faster_coco_eval", "huggingface_hub", "jsonargparse", "lightning", "matplotlib"),
    *("onnx", "onnxruntime", "onnxscript", "pycocotools", "pytorch_lightning", "safetensors", "sklearn", "tensorboard"),
    *("timm", "torch_fidelity", "torchmetrics", "tqdm", "wandb", "yaml"),
)
BLOCKER = f"""
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] in {BLOCKED} else found(name, *args)
"""


def without_extras(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKER + code], capture_output=True, text=True)


def test_attention_and_models_work_with_torch_and_torchvision_alone() -> None:
    done = without_extras("""
import dia_lightning, torch, torchvision
from dia_lightning import attention, models
assert {"attach", "check", "detach"} <= set(dir(dia_lightning)) & set(dia_lightning.__all__)
assert (dia_lightning.attach, dia_lightning.detach) == (attention.attach, attention.detach)
for network in (torchvision.models.resnet18(num_classes=3), models.get_model("cifar_resnet", depth=20, num_classes=3)):
    attached = dia_lightning.attach(network, "dia-lstm")
    attached(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert dia_lightning.detach(attached) is network
assert "timm/resnet18" not in models.list_models()
import dia_lightning.__main__
dia_lightning.__main__.main(["models", "cifar_resnet"])
""")
    assert done.returncode == 0, done.stderr
    assert "cifar_resnet" in done.stdout


def test_every_other_part_says_which_extra_to_install() -> None:
    done = without_extras("""
import importlib
from dia_lightning.__main__ import main
from dia_lightning.models import get_model
parts = ("analysis", "callbacks", "datamodules", "loggers", "tasks", "tasks.classification", "models.pipelines")
for part in (*parts, "reproduce"):
    try:
        importlib.import_module(f"dia_lightning.{part}")
    except ImportError as error:
        print(error)
try:
    get_model("timm/resnet18")
except ImportError as error:
    print(error)
for command in ("fit", "predict", "sites", "check", "export", "sample", "analyze", "reproduce"):
    try:
        main([command, "x"])
    except SystemExit as stop:
        assert stop.code == 2
""")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    of_lightning = 'needs lightning: pip install "dia-lightning[lightning]".'
    assert said == [
        'dia_lightning.analysis needs matplotlib: pip install "dia-lightning[lightning]".',
        *(f"dia_lightning.{part} {of_lightning}" for part in ("callbacks", "datamodules", "loggers", "tasks", "tasks")),
        'Diffusion needs diffusers: pip install "dia-lightning[diffusion]".',
        'dia_lightning.reproduce needs jsonargparse: pip install "dia-lightning[cli]".',
        'timm/resnet18 needs timm: pip install "dia-lightning[timm]".',
    ]
    commands = [line for line in done.stderr.splitlines() if line]
    assert len(commands) == 8
    for line in commands:
        assert line.startswith("dia-lightning: error: dia-lightning ")
        assert line.endswith('needs jsonargparse: pip install "dia-lightning[cli]".')
