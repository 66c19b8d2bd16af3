"""What is used although it is private elsewhere is in the table of CONTRIBUTING.md, and is still as it is used."""

import inspect
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jsonargparse import ArgumentParser
from jsonargparse import Path as ConfigPath  # type: ignore[attr-defined]
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import cli as lightning_cli
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.constants import default_pg_timeout
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.lr_scheduler import ConstantLR, SequentialLR
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.data import dataloader as loading
from torchmetrics import MeanMetric, Metric
from torchvision.models.detection.rpn import RegionProposalNetwork

from dia_lightning.cli.parsing import config_reader
from tests.private_names import found

PARTS = ("jsonargparse", "lightning", "torch", "torchvision", "wandb")
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


class Row(NamedTuple):
    """A line of the table."""

    name: str
    package: str
    where: str
    why: str
    test: str


def table() -> dict[str, Row]:
    text = CONTRIBUTING.read_text().partition("## What we use that is not public")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {row.name: row for row in (Row(cell[0].strip("`"), *cell[1:]) for cell in cells)}


def takes(function: Any, *names: str) -> bool:
    """Whether a function can be called with these arguments, in this order."""
    return list(inspect.signature(function).parameters)[: len(names)] == list(names)


def sets(owner: type, *names: str) -> bool:
    """Whether the methods of a class write these attributes."""
    return all(re.search(rf"self\.{name}(: [^=\n]+)? = ", _source(owner)) for name in names)


def _source(owner: type) -> str:
    return "".join(inspect.getsource(cls) for cls in owner.__mro__ if cls.__module__.partition(".")[0] in PARTS)


@cache
def trainer() -> Any:
    return Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)


def schedule() -> Any:
    return ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


def parser() -> Any:
    made = ArgumentParser()
    made.add_argument("--size", type=int | float)
    return made


def in_backward(ask: Callable[[Any], Any]) -> list[Any]:
    """What a question about a node gives in a backward pass that runs it, and in one that does not."""
    answers: list[Any] = []
    for wanted in (0, 1):
        leaves = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        inner = [leaf * 2 for leaf in leaves]
        outer = inner[0] * inner[1]
        outer.register_hook(lambda _, node=inner[0].grad_fn: answers.append(ask(node)))  # type: ignore[no-untyped-call]
        torch.autograd.grad(outer, leaves[wanted])
    return answers


# ---- what each name is used for, as the lines that use it rely on it


def follows_modes() -> bool:
    modes: Any = torch.overrides._get_current_function_mode_stack
    with torch.device("cpu"):
        inside = [type(mode) for mode in modes()]
    return inside == [import_module("torch.utils._device").DeviceContext] and not modes()


def follows_transforms() -> bool:
    inside: list[bool] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        inside.append(torch._C._are_functorch_transforms_active())
        return x

    torch.func.vmap(ask)(torch.ones(2))
    return inside == [True] and not torch._C._are_functorch_transforms_active()


def follows_levels() -> bool:
    with forward_ad.dual_level():
        inside = forward_ad._current_level
    return (inside, forward_ad._current_level) == (0, -1)


def counts_dispatch_modes() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inside = torch._C._len_torch_dispatch_stack()
    return (inside, torch._C._len_torch_dispatch_stack()) == (1, 0)


def leaves_functions_alone() -> bool:
    with torch.device("meta"), torch._C.DisableTorchFunction():
        return torch.ones(1).device.type == "cpu"


def returns_statistics() -> bool:
    x = torch.randn(5, 2)
    output, mean, factor, *_ = torch.ops.aten._batch_norm_impl_index(x, None, None, None, None, True, 0.1, 0.0, False)
    return torch.allclose((x - mean) * factor, output) and torch.allclose(mean, x.mean(0))


def keeps_hooks(name: str, register: str) -> bool:
    layer: Any = nn.Linear(1, 1)
    before = len(getattr(layer, name))
    handle = getattr(layer, register)(lambda *_: None)
    return before == 0 and list(getattr(layer, name)) == [handle.id]


def follows_global_hooks() -> bool:
    before = bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
    handle = register_module_forward_hook(lambda *_: None)
    during = bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
    handle.remove()
    return during and not before


def counts_writes() -> bool:
    tensor = torch.zeros(1)
    return (tensor._version, tensor.add_(1)._version) == (0, 1)


def compiles_in_place() -> bool:
    layer = nn.Linear(1, 1)
    before = layer._compiled_call_impl
    layer.compile(backend="eager")
    return before is None and layer._compiled_call_impl is not None


def numbers_versions() -> bool:
    classes = (CSVLogger, TensorBoardLogger)
    return all(sets(cls, "_version") and "self._get_next_version()" in _source(cls) for cls in classes)


def follows_a_given_path() -> bool:
    made: Any = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    before = made._checkpoint_connector._user_managed
    made.ckpt_path = "file.ckpt"
    return before is False and made._checkpoint_connector._user_managed is True


def restricts_to_classes() -> bool:
    decorator = import_module("lightning.pytorch.utilities.model_helpers")._restricted_classmethod
    return type(inspect.getattr_static(LightningModule, "load_from_checkpoint")) is decorator


def handles_signals(name: str) -> bool:
    connector = trainer()._signal_connector
    asked = f"self.{name}" in inspect.getsource(type(connector).register_signal_handlers)
    return asked and takes(getattr(connector, name), "signum", "_")


def has_parts_of_networks() -> bool:
    networks = import_module("torchvision.models._utils")
    detection = import_module("torchvision.models.detection._utils")
    return (
        issubclass(networks.IntermediateLayerGetter, nn.ModuleDict)
        and takes(detection.BoxCoder, "weights", "bbox_xform_clip")
        and takes(detection.BoxCoder.decode_single, "self", "rel_codes", "boxes")
        and takes(detection.BoxLinearCoder, "normalize_by_size")
        and takes(detection.BoxLinearCoder.decode, "self", "rel_codes", "boxes")
    )


def walks_through_nests() -> bool:
    tree = import_module("torch.utils._pytree")
    nest = ({"a": 1}, 2.0)
    return bool(
        tree.tree_leaves(nest) == [1, 2.0]
        and tree.tree_map(str, nest) == ({"a": "1"}, "2.0")
        and tree.tree_map_only(int, str, nest) == ({"a": "1"}, 2.0)
    )


def copies_at_once() -> bool:
    there = torch.zeros(1)
    torch._foreach_copy_([there], [torch.ones(1)])
    return there.item() == 1


def names_what_it_wraps() -> bool:
    wrapper = import_module("torch.distributed.algorithms._checkpoint.checkpoint_wrapper").checkpoint_wrapper
    return "_checkpoint_wrapped_module" in dict(wrapper(nn.Linear(1, 1)).named_modules())


def of_diffusers(check: Callable[[Any], bool]) -> bool:
    return check(import_module("diffusers").ModelMixin)


def is_called(name: str, by: Any) -> bool:
    return f".{name}(" in inspect.getsource(by)


def of_wandb(module: str, cls: str, name: str) -> bool:
    return sets(getattr(import_module(f"wandb.sdk.{module}"), cls), name)


CLI = lightning_cli.LightningCLI
CHECKS: dict[str, Callable[[], bool]] = {
    # argparse and jsonargparse
    "_actions": lambda: [action.dest for action in parser()._actions] == ["help", "size"],
    "_action_groups": lambda: all(hasattr(group, "title") for group in parser()._action_groups),
    "_typehint": lambda: parser()._actions[-1]._typehint == int | float,
    "Path.__init__": lambda: takes(config_reader._find_other, "self", "path", "mode"),  # before it is replaced
    "Path.read_text": lambda: takes(config_reader._read_other, "self"),
    "_relative": lambda: ConfigPath(__file__, mode="fr")._relative == __file__,
    # Lightning's command line
    "_InstantiatorFn": lambda: (
        takes(lightning_cli._InstantiatorFn, "cli", "key")
        and "applied_instantiation_links" in inspect.signature(lightning_cli._InstantiatorFn.__call__).parameters
        and sets(lightning_cli._InstantiatorFn, "cli")
    ),
    "_dump_config": lambda: takes(CLI._dump_config, "self") and sets(CLI, "config_dump"),
    "_run_subcommand": lambda: takes(CLI._run_subcommand, "self", "subcommand") and is_called("_run_subcommand", CLI),
    # Lightning's trainer and loops
    "_checkpoint_connector": follows_a_given_path,
    "_user_managed": follows_a_given_path,
    "_checkpoint_io": lambda: trainer().strategy._checkpoint_io is None,
    "_timeout": lambda: DDPStrategy()._timeout == default_pg_timeout,
    "_signal_connector": lambda: trainer()._signal_connector.received_sigterm is False,
    "_sigterm_notifier_fn": lambda: handles_signals("_sigterm_notifier_fn"),
    "_slurm_sigusr_handler_fn": lambda: handles_signals("_slurm_sigusr_handler_fn"),
    "_data_fetcher": lambda: trainer().fit_loop._data_fetcher is None,
    "_should_accumulate": lambda: takes(type(trainer().fit_loop)._should_accumulate, "self"),
    "_should_check_val_fx": lambda: takes(trainer().fit_loop.epoch_loop._should_check_val_fx, "data_fetcher"),
    "_is_training_done": lambda: isinstance(trainer().fit_loop.epoch_loop._is_training_done, bool),
    "_num_ready_batches_reached": lambda: isinstance(trainer().fit_loop.epoch_loop._num_ready_batches_reached(), bool),
    "_restarting": lambda: trainer().fit_loop._restarting is False,
    "_restart_stage": lambda: trainer().fit_loop.epoch_loop.val_loop._restart_stage == RestartStage.NONE,
    "_has_run": lambda: trainer().fit_loop.epoch_loop.val_loop._has_run is False,
    "_sampler": lambda: (
        DistributedSamplerWrapper(order := SequentialSampler([0]), num_replicas=1, rank=0).dataset._sampler is order  # type: ignore[attr-defined]
    ),
    "_restricted_classmethod": restricts_to_classes,
    # Lightning's callbacks and loggers
    "_last_global_step_saved": lambda: ModelCheckpoint()._last_global_step_saved == 0,
    "_monitor_candidates": lambda: {"epoch", "step"} <= set(ModelCheckpoint()._monitor_candidates(trainer())),
    "_save_topk_checkpoint": lambda: takes(ModelCheckpoint._save_topk_checkpoint, "self", "trainer"),
    "_save_last_checkpoint": lambda: takes(ModelCheckpoint._save_last_checkpoint, "self", "trainer"),
    "_average_model": lambda: WeightAveraging()._average_model is None and sets(WeightAveraging, "_average_model"),
    "_latest_update_step": lambda: WeightAveraging()._latest_update_step == 0,
    "_swap_models": lambda: takes(WeightAveraging._swap_models, "self", "pl_module"),
    "_get_next_version": numbers_versions,
    "_experiment": lambda: all(sets(cls, "_experiment") for cls in (CSVLogger, TensorBoardLogger, WandbLogger)),
    "_kwargs": lambda: TensorBoardLogger("", purge_step=1)._kwargs["purge_step"] == 1,
    "_check_log_dir_exists": lambda: "self._check_log_dir_exists()" in _source(ExperimentWriter),
    "_prefix": lambda: sets(WandbLogger, "_prefix"),
    "_id": lambda: sets(WandbLogger, "_id"),
    "_wandb_init": lambda: "**self._wandb_init" in inspect.getsource(WandbLogger.experiment.fget),  # type: ignore[attr-defined]
    "_attach_id": lambda: '"_attach_id"' in inspect.getsource(WandbLogger.experiment.fget),  # type: ignore[attr-defined]
    # wandb
    "_connection": lambda: of_wandb("wandb_setup", "_WandbSetup", "_connection"),
    "_proc": lambda: of_wandb("lib.service.service_connection", "ServiceConnection", "_proc"),
    "_process": lambda: of_wandb("lib.service.service_process", "ServiceProcess", "_process"),
    # torchmetrics and torchvision
    "_apply": lambda: takes(Metric._apply, "self", "fn", "exclude_state"),
    "_update_count": lambda: MeanMetric()._update_count == 0,
    "_computed": lambda: MeanMetric()._computed is None,
    "_post_nms_top_n": lambda: (
        sets(RegionProposalNetwork, "_post_nms_top_n")
        and '_post_nms_top_n["testing"]' in inspect.getsource(RegionProposalNetwork)
    ),
    "_utils": has_parts_of_networks,
    "loading.MP_STATUS_CHECK_INTERVAL": lambda: import_module("torch.utils.data._utils").MP_STATUS_CHECK_INTERVAL > 0,
    # diffusers
    "_fix_state_dict_keys_on_load": lambda: of_diffusers(
        lambda cls: (
            takes(cls._fix_state_dict_keys_on_load, "self", "state_dict")
            and is_called("_fix_state_dict_keys_on_load", inspect.getmodule(cls))
        )
    ),
    "_get_init_keys": lambda: of_diffusers(
        lambda cls: (
            takes(import_module("diffusers").ConfigMixin._get_init_keys, "input_class")
            and is_called("_get_init_keys", import_module("diffusers.configuration_utils"))
        )
    ),
    "_internal_dict": lambda: "_internal_dict" in inspect.getsource(import_module("diffusers").ConfigMixin.config.fget),
    # torch: who follows what runs
    "_C": leaves_functions_alone,
    "_are_functorch_transforms_active": follows_transforms,
    "_current_level": follows_levels,
    "_get_current_function_mode_stack": follows_modes,
    "_device": lambda: follows_modes() and WeightAveraging(device="cpu")._device == torch.device("cpu"),
    "_len_torch_dispatch_stack": counts_dispatch_modes,
    "_current_graph_task_id": lambda: (
        torch._C._current_graph_task_id() == -1
        and all(number >= 0 for number in in_backward(lambda _: torch._C._current_graph_task_id()))
    ),
    "_will_engine_execute_node": lambda: in_backward(torch._C._will_engine_execute_node) == [True, False],
    "_has_any_global_hook": follows_global_hooks,
    "_forward_hooks": lambda: keeps_hooks("_forward_hooks", "register_forward_hook"),
    "_forward_pre_hooks": lambda: keeps_hooks("_forward_pre_hooks", "register_forward_pre_hook"),
    "_backward_hooks": lambda: keeps_hooks("_backward_hooks", "register_full_backward_hook"),
    "_backward_pre_hooks": lambda: keeps_hooks("_backward_pre_hooks", "register_full_backward_pre_hook"),
    # torch: modules and tensors
    "_modules": lambda: list(nn.Sequential(nn.ReLU(), nn.ReLU())._modules) == ["0", "1"],
    "_load_from_state_dict": lambda: takes(nn.Module._load_from_state_dict, "self", "state_dict", "prefix"),
    "_compiled_call_impl": compiles_in_place,
    "_dynamo": lambda: (
        isinstance(torch._dynamo.config.recompile_limit, int)
        and isinstance(torch._dynamo.config.accumulated_recompile_limit, int)
    ),
    "_checkpoint_wrapped_module": names_what_it_wraps,
    "_version": lambda: counts_writes() and CSVLogger("")._version is None and numbers_versions(),
    "_pytree": walks_through_nests,
    "_batch_norm_impl_index": returns_statistics,
    "_foreach_copy_": copies_at_once,
    # torch: training and loading
    "_last_lr": lambda: schedule()._last_lr == schedule().get_last_lr(),
    "_step_count": lambda: "_step_count" in vars(schedule()),
    "_schedulers": lambda: (
        SequentialLR((part := schedule()).optimizer, [part, part], milestones=[1])._schedulers[0] is part
    ),
    "_per_optimizer_states": lambda: torch.amp.GradScaler("cpu")._per_optimizer_states[0]["found_inf_per_device"] == {},
    "_BaseDataLoaderIter": lambda: takes(loading._BaseDataLoaderIter, "loader"),
    "_MultiProcessingDataLoaderIter": lambda: takes(loading._MultiProcessingDataLoaderIter, "loader"),
    "_get_iterator": lambda: is_called("_get_iterator", DataLoader.__iter__),
    "_try_get_data": lambda: takes(loading._MultiProcessingDataLoaderIter._try_get_data, "self", "timeout"),
    "_workers": lambda: sets(loading._MultiProcessingDataLoaderIter, "_workers"),
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_private_name_is_as_the_code_that_uses_it_needs_it(name: str) -> None:
    row = table()[name]
    try:
        change = "" if CHECKS[name]() else "is not as it was"
    except Exception as error:
        change = f"fails with {error!r}"
    assert not change, f"{row.package}: {name} {change}, which {row.where} use {row.why}; see tests/{row.test}"


def test_every_private_name_that_is_used_is_in_the_table_and_has_a_check() -> None:
    assert sorted(found()) == sorted(table())
    assert sorted(CHECKS) == sorted(table())


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_the_table_says_where_a_name_is_used_and_what_tests_it(name: str) -> None:
    row = table()[name]
    assert re.findall(r"`([^`]+)`", row.where) == sorted(found()[name])
    assert (CONTRIBUTING.parent / "tests" / row.test.strip("`")).is_file()
