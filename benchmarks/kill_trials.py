"""Kills a training at random moments, resumes it, and compares its last checkpoint with an uninterrupted one's.

``python -m benchmarks.kill_trials --trials 5 --task diffusion``; the exit code is 1 if a trial differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CONFIGS = Path(__file__).parents[1] / "configs"
_SMALL = {  # trainings of ten to twenty seconds, mostly spent on starting the program
    "classification": "--data.image_size 8 --model.backbone_args.depth 11 --trainer.max_epochs 8 --data.batch_size 32 "
    "--data.limit 320 --data.val_split 60",
    "detection": "--data.image_size 64 --model.detector_args.min_size 64 --model.detector_args.max_size 64 "
    "--data.limit 24 --trainer.max_epochs 3",
    "diffusion": "--data.limit 640 --trainer.max_epochs 8",
}
_PATHS = {"best_model_path", "last_model_path", "kth_best_model_path", "best_k_models", "dirpath", "dia_run"}


def command(task: str, workers: int) -> list[str]:
    """Return a training that saves a checkpoint every third step."""
    options = (
        f"-c {_CONFIGS / task / 'digits.yaml'} {_SMALL[task]} --data.num_workers {workers} "
        "--trainer.enable_progress_bar false --trainer.accelerator cpu --test_after_fit false "
        "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.init_args.every_n_train_steps 3 "
        "--trainer.callbacks.init_args.filename last-step --trainer.callbacks.init_args.enable_version_counter false"
    )
    return [sys.executable, "-m", "dia_lightning", "fit", *options.split()]


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the newest ``last.ckpt`` below a folder."""
    newest = max(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return dict(torch.load(newest, weights_only=True))


def is_equal(first: Any, second: Any) -> bool:
    """Compare two checkpoints bit for bit, except paths: a training killed before its first checkpoint starts over."""
    if isinstance(first, dict) and isinstance(second, dict):
        names = first.keys() - _PATHS
        return names == second.keys() - _PATHS and all(is_equal(first[name], second[name]) for name in names)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(is_equal(*pair) for pair in zip(first, second, strict=True))
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)


def train_and_kill(args: list[str], folder: Path, seconds: float, moments: random.Random) -> int:
    """Return how often a training was killed before it ended."""
    folder.mkdir()
    kills = 0
    while True:
        goes_on = ["--ckpt_path", "last"] if any(folder.rglob("last*.ckpt")) else []
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen([*args, *goes_on], cwd=folder, stdout=log, stderr=log)
            # at most three times; part of the time goes to starting the program, when nothing is trained yet
            limit = moments.uniform(0.4, 0.8) * seconds if kills < 3 else None
            try:
                if process.wait(limit) != 0:
                    raise RuntimeError(f"The training failed: see {folder / 'log'}.")
                return kills
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1


def main() -> int:
    """Run the trials; return how many differ from the uninterrupted training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--task", choices=sorted(_SMALL), default="classification")
    parser.add_argument("--workers", type=int, default=0, help="loader workers")
    parser.add_argument("--seed", type=int, default=0, help="for the random moments")
    options = parser.parse_args()
    moments, args, wrong = random.Random(options.seed), command(options.task, options.workers), 0
    with tempfile.TemporaryDirectory() as work:
        straight = Path(work, "straight")
        straight.mkdir()
        begin = time.monotonic()
        subprocess.run(args, cwd=straight, check=True, capture_output=True)
        seconds = time.monotonic() - begin
        for trial in range(options.trials):
            folder = Path(work, str(trial))
            kills = train_and_kill(args, folder, seconds, moments)
            equal = is_equal(last_checkpoint(straight), last_checkpoint(folder))
            wrong += not equal
            print(f"trial {trial}: killed {kills} times, {'equal' if equal else 'NOT EQUAL'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
