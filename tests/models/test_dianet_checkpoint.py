"""Networks from the authors' checkpoints compute what the authors' code computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.models import cifar_wrn, load_dianet_checkpoint
from dia_lightning.models._dianet_checkpoint import _LAYOUTS, _family, _rename
from tests.golden import deterministic_weights

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = sorted(GOLDEN.glob("dianet_*.npz"))
# float32 is compared with float64: a rounding of 6e-8 grows through some fifty layers
TOLERANCES = [pytest.param(torch.float64, 1e-10, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")]


def authors_state(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"dianet_{name}.npz") as golden:
        return deterministic_weights.state_dict(json.loads(str(golden["shapes"])))


def cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: weight.to(dtype) if weight.is_floating_point() else weight for key, weight in state.items()}


def relative_error(found: Tensor, golden: Any) -> float:
    expected = torch.as_tensor(golden, dtype=torch.float64)
    return float((found.detach().double() - expected).abs().max() / expected.abs().max())


def test_golden_files_cover_all_families() -> None:
    assert {file.stem.removeprefix("dianet_").split("1")[0].split("2")[0] for file in FILES} == {
        "resnet",
        "preresnet",
        "wrn",
        "resnext",
    }


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_outputs_and_gradients_equal_the_authors(file: Path, dtype: torch.dtype, tolerance: float) -> None:
    golden = np.load(file)
    state = cast(deterministic_weights.state_dict(json.loads(str(golden["shapes"]))), dtype)
    network = load_dianet_checkpoint(state)
    images = deterministic_weights.images().to(dtype)
    assert relative_error(network.eval()(images), golden["eval_logits"]) < tolerance

    logits = network.train()(images)
    loss = nn.functional.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1])
    loss.backward()  # type: ignore[no-untyped-call]
    assert relative_error(logits, golden["train_logits"]) < tolerance
    assert relative_error(loss, golden["train_loss"]) < tolerance
    # the running statistics moved as the authors' did
    assert relative_error(network.eval()(images), golden["eval_logits_after_training_step"]) < tolerance

    layout = _LAYOUTS[_family(state)]
    parameters = network.state_dict(keep_vars=True)
    gradients = {name: parameters.pop(_rename(name, layout)).grad for name in golden["gradient_names"].tolist()}
    assert not any(isinstance(tensor, nn.Parameter) for tensor in parameters.values()), "more than the authors have"
    largest = golden["gradient_norms"].max()
    for index, (name, gradient) in enumerate(gradients.items()):
        assert gradient is not None, name
        scale = max(golden["gradient_norms"][index], 1e-2 * largest)
        probe = deterministic_weights.probe(name, gradient)
        assert float(gradient.double().norm()) == pytest.approx(golden["gradient_norms"][index], abs=tolerance * scale)
        assert probe == pytest.approx(golden["gradient_probes"][index], abs=10 * tolerance * scale), name
        if f"gradient/{name}" in golden:
            difference = (gradient.double() - torch.from_numpy(golden[f"gradient/{name}"])).norm()
            assert float(difference) < tolerance * scale, name


def test_file_with_data_parallel_keys_loads_like_the_bare_state_dict(tmp_path: Path) -> None:
    state = authors_state("preresnet20")
    path = tmp_path / "model_best.pth.tar"
    wrapped = {f"module.{key}": weight for key, weight in state.items()}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9).state_dict()
    checkpoint = {"epoch": 3, "state_dict": wrapped, "acc": 0.5, "best_acc": torch.tensor(0.6), "optimizer": optimizer}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)  # as written by torch before 1.6
    images = deterministic_weights.images()
    expected = load_dianet_checkpoint(state).eval()(images)
    assert torch.equal(load_dianet_checkpoint(path).eval()(images), expected)
    assert torch.equal(load_dianet_checkpoint(str(path)).eval()(images), expected)
    assert torch.equal(load_dianet_checkpoint(checkpoint).eval()(images), expected)


def test_counters_of_norms_may_be_missing_as_in_old_checkpoints() -> None:
    state = {key: w for key, w in authors_state("wrn10_4").items() if not key.endswith("num_batches_tracked")}
    network = load_dianet_checkpoint(state)
    assert torch.equal(network.get_parameter("fc.weight"), state["fc.weight"])


@pytest.mark.parametrize("reduction", [1, 20, 100])
def test_any_reduction_is_read_from_the_shapes(reduction: int) -> None:
    state = authors_state("resnet11")
    for key in [key for key in state if ".lstm." in key and ".seq." in key]:
        shape = list(state[key].shape)
        channels = 64 * 2 ** (int(key.removeprefix("layer")[0]) - 1)
        shrunk = 0 if ".seq.0." in key else 1
        if len(shape) > shrunk:
            shape[shrunk] = max(1, channels // reduction)
        state[key] = deterministic_weights.weight(key, tuple(shape))
    network = load_dianet_checkpoint(state)
    weight = network.get_parameter("layer3.0.dia.input_reduce.weight")
    assert torch.equal(weight, state["layer3.lstm.w_ih.0.seq.0.weight"])


def test_stacked_cells_are_read_from_the_keys() -> None:
    state = authors_state("resnet20")
    for stage, channels in ((1, 64), (2, 128), (3, 256)):
        for layer in ("w_ih.1", "w_hh.1", "w_ih.2", "w_hh.2"):
            key = f"layer{stage}.lstm.{layer}"
            state[f"{key}.weight"] = deterministic_weights.weight(f"{key}.weight", (4 * channels, channels))
            state[f"{key}.bias"] = deterministic_weights.weight(f"{key}.bias", (4 * channels,))
    network = load_dianet_checkpoint(state)
    upper = network.get_parameter("layer2.0.dia.upper.1.hidden.weight")
    assert torch.equal(upper, state["layer2.lstm.w_hh.2.weight"])
    assert network.eval()(deterministic_weights.images()).shape == (4, 7)


def test_grey_images_are_read_from_the_stem() -> None:
    state = authors_state("wrn10_4")
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    assert load_dianet_checkpoint(state)(torch.rand(2, 1, 32, 32)).shape == (2, 10)


def test_half_precision_weights_become_float32() -> None:
    network = load_dianet_checkpoint(cast(authors_state("resnet11"), torch.float16))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint file at '.*nothing\.pth'"):
        load_dianet_checkpoint(tmp_path / "nothing.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.pth' is damaged or holds more than weights"):
        load_dianet_checkpoint(path)


def test_file_with_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"weights_only=False\)\['state_dict'\]"):
        load_dianet_checkpoint(path)


def test_file_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "log.pth")
    with pytest.raises(ValueError, match=r"Expected a state dict of tensors.*found epoch, loss"):
        load_dianet_checkpoint(tmp_path / "log.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, expected"):
        load_dianet_checkpoint(tmp_path / "list.pth")


def test_unknown_layout_names_what_was_looked_for() -> None:
    plain = cifar_wrn(depth=10, widen_factor=1).state_dict()
    with pytest.raises(ValueError, match=r"looked for bn1\.weight and layer1\.lstm.*cifar_wrn.*found conv1\.weight"):
        load_dianet_checkpoint(plain)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("fc.weight", r"fc\.weight"),
        ("conv1.weight", r"conv1\.weight"),
        ("layer2.lstm.w_ih.0.seq.0.weight", r"layer2\.0\.dia\.input_reduce\.weight"),
        ("layer2.ModuleList.0.bn3.bias", r"layer2\.0\.bn3\.bias"),
    ],
)
def test_incomplete_checkpoint_is_refused(lost: str, named: str) -> None:
    state = authors_state("resnet11")
    del state[lost]
    with pytest.raises(ValueError, match=rf"The checkpoint .*{named}\"?\.$"):
        load_dianet_checkpoint(state)


def test_unequal_stages_are_refused() -> None:
    state = {k: w for k, w in authors_state("resnet20").items() if not k.startswith("layer2.ModuleList.1.")}
    with pytest.raises(ValueError, match=r"the checkpoint has \[2, 1, 2\] blocks"):
        load_dianet_checkpoint(state)


def test_unequal_reductions_are_refused() -> None:
    state = authors_state("resnet11")
    state["layer2.lstm.w_ih.0.seq.0.weight"] = torch.zeros(50, 128)
    with pytest.raises(ValueError, match=r"No single reduction.*64 to 16, 128 to 50, 256 to 64"):
        load_dianet_checkpoint(state)


def test_weights_that_do_not_fit_are_refused() -> None:
    state = authors_state("resnext11_8x32")
    state["stage_2.ModuleList.0.bn.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"looks like cifar_resnext\(depth=11, .*layer2\.0\.bn2\.weight"):
        load_dianet_checkpoint(state)
