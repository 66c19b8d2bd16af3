"""Values out of range, of another type, unknown or not a number end the command with one line, before it trains."""

from pathlib import Path

import pytest

from dia_lightning.__main__ import main

#: As small as it can be: most of the time goes into parsing it.
CONFIG = """\
trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false, enable_model_summary: false}
model: {class_path: ClassificationTask, init_args: {backbone: cifar_resnet, backbone_args: {depth: 11}, attention: se}}
data: {class_path: DigitsDataModule, init_args: {image_size: 8, batch_size: 10, limit: 20}}
"""

#: One option with a value of each kind.
ODD = """
trainer.max_epochs=-2 trainer.max_epochs=1.5 trainer.max_epochs=.nan
trainer.min_epochs=-1 trainer.max_steps=-2 trainer.min_steps=-1
trainer.accumulate_grad_batches=-1 trainer.accumulate_grad_batches=0 trainer.accumulate_grad_batches=1.5
trainer.gradient_clip_val=-1 trainer.gradient_clip_val=.nan trainer.gradient_clip_algorithm=abc
trainer.limit_train_batches=-1 trainer.limit_train_batches=.nan
trainer.limit_val_batches=-0.1 trainer.overfit_batches=-1
trainer.val_check_interval=-1 trainer.val_check_interval=0 trainer.val_check_interval=1.5
trainer.check_val_every_n_epoch=-1 trainer.check_val_every_n_epoch=0 trainer.num_sanity_val_steps=-2
trainer.log_every_n_steps=-1 trainer.devices=0 trainer.devices=-2 trainer.devices=abc trainer.num_nodes=0
trainer.precision=15 trainer.max_time=-1 trainer.max_time={hours:-1}
trainer.fast_dev_run=-1 trainer.profiler=abc trainer.callbacks=5
seed_everything=-1 seed_everything=1.5 seed_everything=4294967296
model.lr=0 model.lr=-1 model.lr=.nan model.lr=.inf model.lr=true
model.momentum=-1 model.momentum=2 model.weight_decay=-1 model.warmup_epochs=-1 model.label_smoothing=1.5
model.attention_lr=-1 model.layer_decay=2 model.dropout=1.5 model.schedule=abc model.optimizer=5
model.attention_args={reduction:-1} model.attention_args={reduction:.nan} model.attention_args={reduc:4}
model.backbone_args={depth:-1} model.plug=-1 model.freeze=[nothing*]
data.batch_size=0 data.batch_size=1.5 data.batch_size=.nan
data.num_workers=-1 data.val_split=-1 data.val_split=1.5 data.val_split=.nan
data.limit=0 data.limit=.nan data.split_seed=-1 data.bit_depth=17 data.image_size=0
data.augment=abc
"""


@pytest.mark.parametrize("option", ODD.split())
def test_an_odd_value_is_refused_in_one_line(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["dia-lightning"])
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "tiny.yaml", f"--{option.replace(':', ': ')}"])
    assert end.value.code == 2
    shown = capfd.readouterr()
    assert [line for line in shown.err.splitlines() if "error" in line] == [shown.err.splitlines()[-1]]
    assert shown.err.splitlines()[-1].startswith("dia-lightning: error: ")
    assert "Traceback" not in shown.err
