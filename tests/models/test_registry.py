"""Networks by name, of this package and of other libraries."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dia_lightning.models import _registry, get_model, libraries, list_models, register_model


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry, restored afterwards."""
    monkeypatch.setattr(_registry, "_BUILDERS", dict(_registry._BUILDERS))
    return _registry._BUILDERS


def test_own_networks_are_listed() -> None:
    own = [name for name in list_models() if "/" not in name]
    assert set(own) >= {
        "cifar_preresnet",
        "cifar_resnet",
        "cifar_resnext",
        "cifar_wrn",
        "preresnet164",
        "resnet164",
        "resnext101_8x32",
        "wrn52_4",
    }
    assert own == sorted(own)


def test_classification_networks_of_torchvision_are_listed() -> None:
    names = list_models("torchvision/*")
    assert {"torchvision/resnet50", "torchvision/vit_b_16", "torchvision/swin_t"} <= set(names)
    assert not any("rcnn" in name or "quantized" in name or "deeplab" in name for name in names)


@pytest.mark.parametrize("name", [name for name in list_models() if "/" not in name])
def test_every_own_network_is_built_from_its_name_alone(name: str) -> None:
    with torch.device("meta"):
        network = get_model(name, num_classes=7)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 7)


def test_arguments_reach_the_builder(registry: dict[str, Any]) -> None:
    @register_model("recorded")
    def build(*, num_classes: int = 10, depth: int = 1) -> nn.Module:
        return nn.Linear(depth, num_classes)

    assert get_model("recorded").get_parameter("weight").shape == (10, 1)
    assert get_model("recorded", num_classes=3, depth=2).get_parameter("weight").shape == (3, 2)
    assert "recorded" in list_models()


def test_builder_with_open_keywords_gets_them_all(registry: dict[str, Any]) -> None:
    @register_model("open")
    def build(**options: int) -> nn.Module:
        return nn.Linear(options["width"], options["num_classes"])

    assert get_model("open", num_classes=3, width=2).get_parameter("weight").shape == (3, 2)


def test_name_can_be_registered_once(registry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'resnet164' is already registered"):
        register_model("resnet164")(nn.Identity)


def test_name_with_slash_is_refused(registry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'torchvision/mine' must not have a slash"):
        register_model("torchvision/mine")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("resent164", "Did you mean 'resnet164'"),
        ("wrn54_2", "Did you mean 'wrn52_4'"),
        ("cifar_resnets", "Did you mean 'cifar_resnet'"),
        ("resnet50", "Did you mean 'torchvision/resnet50'"),
        ("torchvision/resnet19", "Did you mean .*'torchvision/resnet18'"),
        ("torchvison/resnet18", "Other libraries are reached by torchvision/NAME or timm/NAME"),
        ("keras/resnet18", "Other libraries are reached by torchvision/NAME or timm/NAME"),
        ("qqqqqqqq", r"`dia-lightning models`, list_models\(\) in Python, has all names"),
    ],
)
def test_typo_names_the_nearest_entries(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown model '{typo}'\. .*{meant}"):
        get_model(typo)


def test_wrong_keyword_lists_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match=r"cifar_wrn does not take 'width'\. It takes: depth, widen_factor, dropout, "):
        get_model("cifar_wrn", width=4)
    with pytest.raises(ValueError, match=r"torchvision/resnet18: .*'width'.*: num_classes, zero_init_residual"):
        get_model("torchvision/resnet18", width=4)
    with pytest.raises(ValueError, match=r"torchvision/regnet_y_400mf: .*'width'.*: num_classes, stem_width"):
        get_model("torchvision/regnet_y_400mf", width=4)


def test_type_error_of_a_builder_is_not_covered_up() -> None:
    with pytest.raises(TypeError, match=r"empty|str"):  # of torch, whose words differ between versions
        get_model("torchvision/resnet18", num_classes="ten")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet", "inception_v3"])
def test_torchvision_networks_return_logits_in_training(name: str) -> None:
    with torch.device("meta"):
        network = get_model(f"torchvision/{name}", num_classes=7)
        assert network.train()(torch.empty(2, 3, 299, 299)).shape == (2, 7)


HEADS = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11",
    "vit_b_32",
]


@pytest.mark.parametrize("name", HEADS)
def test_classifier_of_every_torchvision_family_can_be_replaced(name: str) -> None:
    with torch.device("meta"):
        network = get_model(f"torchvision/{name}")
        libraries.replace_head(network, 7)
        assert network.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 7)


@pytest.fixture
def stored_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the download of ResNet18's weights."""
    weights: dict[str, Any] = torchvision.models.resnet18(weights=None).state_dict()
    enum = torchvision.models.ResNet18_Weights
    monkeypatch.setattr(enum, "get_state_dict", lambda self, *args, **kwargs: weights)
    return weights


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
@pytest.mark.parametrize("num_classes", [None, 7, 1000])
def test_weights_of_torchvision_come_with_any_number_of_classes(
    stored_weights: dict[str, Any], weights: str, num_classes: int | None
) -> None:
    network = get_model("torchvision/resnet18", num_classes=num_classes, weights=weights)
    assert torch.equal(network.get_parameter("layer4.1.conv2.weight"), stored_weights["layer4.1.conv2.weight"])
    assert network.get_parameter("fc.weight").shape == (num_classes or 1000, 512)
    assert num_classes == 7 or torch.equal(network.get_parameter("fc.bias"), stored_weights["fc.bias"])


def store_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Lay a network's weights where torchvision looks before it downloads, and return them."""
    build = getattr(torchvision.models, name)
    options = {} if name == "resnet18" else {"init_weights": False, "aux_logits": True}
    network = build(weights=None, **options)
    state: dict[str, Tensor] = network.state_dict()
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(state, checkpoints / url.rpartition("/")[2])
    return state


AUXILIARY = {"resnet18": [], "googlenet": ["aux1", "aux2"], "inception_v3": ["AuxLogits"]}


@pytest.mark.parametrize("name", AUXILIARY)
def test_stored_weights_of_torchvision_are_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    stored = store_weights(tmp_path, name)
    kept = {key: weight for key, weight in stored.items() if key.partition(".")[0] not in AUXILIARY[name]}
    loaded = get_model(f"torchvision/{name}", weights="DEFAULT")
    torch.testing.assert_close(dict(loaded.state_dict()), kept, rtol=0, atol=0)

    network = get_model(f"torchvision/{name}", weights="DEFAULT", num_classes=7).train()
    assert network.to("meta")(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, 7)
    assert network.state_dict().keys() == kept.keys()
    assert network.state_dict()["fc.weight"].shape == (7, stored["fc.weight"].shape[1])

    if AUXILIARY[name]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, that its auxiliary heads are not trained
            network = get_model(f"torchvision/{name}", weights="DEFAULT", num_classes=7, aux_logits=True).train()
        outputs = network.to("meta")(torch.empty(2, 3, 299, 299, device="meta"))
        assert {tuple(output.shape) for output in outputs} == {(2, 7)}


def test_unknown_weights_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no weights 'V3'\. Available: IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        get_model("torchvision/resnet50", weights="V3")


class TestTimm:
    @pytest.fixture(autouse=True)
    def _needs_timm(self) -> None:
        pytest.importorskip("timm")

    def test_network_is_built(self) -> None:
        network = get_model("timm/resnet18", num_classes=7, in_chans=1)
        assert network(torch.rand(2, 1, 32, 32)).shape == (2, 7)

    def test_networks_are_listed(self) -> None:
        assert {"timm/resnet50", "timm/vit_tiny_patch16_224"} <= set(list_models())

    def test_typo_names_the_nearest_entries(self) -> None:
        with pytest.raises(ValueError, match=r"Unknown model 'timm/resnt18'\. Did you mean .*'timm/resnet18'"):
            get_model("timm/resnt18")

    def test_wrong_keyword_lists_the_accepted_ones(self) -> None:
        with pytest.raises(ValueError, match=r"timm/resnet18: .*'width'.*in_chans"):
            get_model("timm/resnet18", width=4)


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


@pytest.mark.usefixtures("without_timm")
def test_without_timm_its_networks_say_what_to_install() -> None:
    assert not list_models("timm/*")
    with pytest.raises(ImportError, match=r'timm/resnet18 needs timm: pip install "dia-lightning\[timm\]"'):
        get_model("timm/resnet18")


def test_no_library_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from dia_lightning.models import get_model, list_models;"
        "get_model('cifar_resnet', depth=11); list_models('cifar_*');"
        "heavy = {'lightning', 'wandb', 'timm', 'diffusers', 'torchvision'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_failed_assertion_of_a_library_is_reported_with_the_arguments() -> None:
    with pytest.raises(ValueError, match=r"timm/regnetx_002 cannot be built with \{'depth': 20\}.*backbone_args null"):
        get_model("timm/regnetx_002", depth=20)
