"""No secret that a command is given is in a file that it writes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dia_lightning.__main__ import main
from dia_lightning._redact import redact, redact_arguments, redact_text
from dia_lightning.reproduce.experiment import read_experiment
from dia_lightning.reproduce.table import write_comparison
from tests.cli.conftest import Run

CANARY = "canary-51ng5"
NAMES = (
    *("api_key", "API-KEY", "apiKey", "hf_token", "client_secret", "dbPassword", "passwd", "passphrase", "credential"),
    *(
        "aws_credentials",
        "pat",
        "github_pat",
        "dsn",
        "SENTRY_DSN",
        "private_key",
        "auth",
        "Authorization",
        "jwt",
        "pwd",
    ),
    *("smtpPass", "session_cookie", "sasSignature", "pin"),
)
HARMLESS = {
    "max_tokens": 77,
    "num_class_tokens": 1,
    "key_dim": 16,
    "token_mixers": ("repmixer", "attention"),
    "pw_ratio": 0.5,
    "pw_kernel_size": 3,
    "pin_memory_device": "cuda",
    "tokenizer": "13a",
    "high_pass_filter": "sobel",
    "monkey": "animal",
    "root": "/data/key=abc/pin=3",
    "notes": "max_tokens=77, key_dim=16",
    "run": "sk-resnet50-baseline-with-cutmix and hf_resnet50_imagenet_finetuned",
    "path": "a/b",
    "patch": "8x8",
    "pattern": "a=b",
    "passes": "two",
    "author": "me",
    "signal": "x",
    "ping": "pong",
    "use_auth": True,
    "url": "https://host:80/a@b?size=3#top",
    "text": "mail me@host, at 10:30, lr=0.1, epoch={epoch}-{val/acc:.4f}",
    "class_path": "torch.optim.SGD",
}
TEXTS = (
    f"https://user:{CANARY}@host/x",
    f"https://user:p@{CANARY}@host/x",
    f"https://{CANARY}@host",
    f"git+ssh://me:{CANARY}@host:22/x.git and more",
    f"s3://bucket/x?a=1&token={CANARY}&b=2",
    f"https://host/x?X-Amz-Signature={CANARY}",
    f"https://host/x#access_token={CANARY}",
    f"host=db user=me password={CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_below_the_name_of_a_secret_is_replaced(name: str) -> None:
    for given in (CANARY, [CANARY], {"value": [{"x": CANARY}]}):
        assert CANARY not in repr(redact({"a": [{name: given}]}))
        for arguments in (
            [f"--model.{name}={given}"],
            [f"--model.{name}", str(given)],
            ["--c", f"{{{name}: {given}}}"],
        ):
            assert CANARY not in " ".join(redact_arguments(arguments)), arguments


@pytest.mark.parametrize("text", TEXTS)
def test_what_shows_a_secret_by_itself_is_replaced(text: str) -> None:
    assert CANARY not in redact_text(text)
    assert CANARY not in repr(redact({"a": [text]}))
    assert CANARY not in " ".join(redact_arguments([text, "--url", text, f"--url={text}", f"--x={{a: [{text!r}]}}"]))


def test_all_else_stays_as_it_is() -> None:
    assert redact(HARMLESS) == HARMLESS
    arguments = [
        "fit",
        "-c",
        "a.yaml",
        *(f"--{name}={value}" for name, value in HARMLESS.items()),
        "--x",
        "{'a': 1e-3}",
    ]
    assert redact_arguments(arguments) == arguments


def test_a_command_writes_no_secret(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY:0<40}")
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{CANARY}@127.0.0.1:9")
    if shutil.which("git") is not None:  # W&B records the remote of the repository
        for command in (["init", "-q"], ["remote", "add", "origin", f"https://me:{CANARY}@host/x.git"]):
            subprocess.run(["git", *command], check=True)
    secrets = yaml.safe_dump({"url": TEXTS[0], "deep": [{"dsn": CANARY}]}, default_flow_style=True, width=1000).strip()
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "tiny"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "board"}},
        {"class_path": "dia_lightning.loggers.WandbLogger", "init_args": {"save_dir": "runs", "notes": TEXTS[2]}},
    ]
    Path("loggers.yaml").write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    arguments = ["fit", "-c", "tiny.yaml", "-c", "loggers.yaml", f"--trainer.logger.init_args.config={secrets}"]
    monkeypatch.setattr(sys, "argv", ["dia-lightning", *arguments])
    main()
    wandb.finish()
    assert sys.argv[1:] == arguments
    written = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert {".wandb", ".ckpt", ".yaml", ".csv", ".log"} <= {path.suffix for path in written}
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert b"tiny.yaml" in b"".join(path.read_bytes() for path in written if path.suffix == ".wandb")
    assert CANARY not in "".join(capfd.readouterr())


def test_a_checkpoint_has_no_secret_and_goes_on_without(
    run: Run, workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("secret_units.py").write_text(
        "from torch import nn\n"
        "class Unit(nn.Module):\n"
        "    def __init__(self, channels, hub_token='none'):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Parameter(__import__('torch').ones(channels, 1, 1))\n"
        "    def forward(self, features, state):\n"
        "        return self.scale.sigmoid().expand(len(features), -1, -1, -1), None\n"
    )
    own = ["--model.attention", "secret_units.Unit", f"--model.attention_args={{hub_token: {CANARY}}}"]
    run("fit", "-c", "tiny.yaml", *own)
    path = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    kept = torch.load(path, weights_only=True)
    assert kept["hyper_parameters"]["attention_args"] == {"hub_token": "***"}
    run("test", "-c", "tiny.yaml", *own, "--ckpt_path", str(path))
    assert not [file for file in Path("runs").rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    assert CANARY not in "".join(capfd.readouterr())
    run("test", "-c", "tiny.yaml", *own[:2], "--ckpt_path", str(path))
    assert "not taken from the checkpoint, because it is no plain data: attention_args" in capfd.readouterr().err


def test_a_comparison_shows_no_secret_in_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("{}")
    Path("spec.yaml").write_text(
        f"{{name: s, base: [base.yaml], seeds: [0], metrics: {{a: }}, arms: {{b: {{model.x: {{token: {CANARY}}}}}}}}}"
    )
    experiment = read_experiment("spec.yaml")
    written = write_comparison(experiment, {}, tmp_path).read_text()
    assert "token" in written
    assert CANARY not in written
