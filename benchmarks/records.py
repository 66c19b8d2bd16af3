"""How measurements are stored: as rows in a JSON file, with the machine and the command."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dia_lightning import __version__

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


def results_folder(*, tiny: bool) -> Path:
    """Return ``$OUT`` or ``benchmarks/results``; for dry runs a folder in it, which no report reads."""
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return folder / "tiny" if tiny else folder


class Results:
    """A file of rows, rewritten after every row, so that a kill loses nothing.

    Args:
        path: of the file, which is replaced.
        part: what is measured; the report finds it by this.
    """

    def __init__(self, path: Path, part: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.content: Row = {"part": part, "machine": machine(), "command": _command(), "rows": []}
        self._write()

    def add(self, row: Row) -> None:
        """Store a row, and print it."""
        self.content["rows"].append(row)
        self._write()
        values = ", ".join(f"{key} {_short(value)}" for key, value in row.items())
        print(f"{self.content['part']}: {values}", flush=True)

    def _write(self) -> None:
        _replace(self.path, self.content)


def note_stop(path: Path, reason: str) -> None:
    """Record in a file, if it exists, why there are no more rows."""
    if path.is_file():
        _replace(path, {**json.loads(path.read_text()), "stopped": reason})


def _replace(path: Path, content: Row) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n")
    new.replace(path)  # never half a file


def machine() -> dict[str, str]:
    """Describe the machine, the versions, and how busy it was."""
    found = {
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dia_lightning": f"{__version__} {_output('git', '-C', str(ROOT), 'describe', '--always', '--dirty')}".strip(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _command() -> str:
    module = Path(sys.argv[0]).stem
    return " ".join(["python -m", f"benchmarks.{module}", *sys.argv[1:]])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
