"""Checkpoints that a full disk, a kill or a flipped bit cannot spoil unnoticed."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from dia_lightning import _checkpoint_file
from dia_lightning._whole_files import remove_parts


class SafeCheckpointIO(TorchCheckpointIO):
    """Write checkpoints beside their place, flush them and rename them; read them only if they are what was written.

    A file that is overwritten, such as ``last.ckpt``, is at every moment the old one or the new one. At its end it has
    a digest, which torch ignores; files without one are held against the checksums that torch writes. What a killed
    process has left in a folder is removed by the next one that writes there. The command line uses it unless
    ``--trainer.plugins`` has another. Sharded checkpoints (FSDP), and those on remote disks, are Lightning's.

    Raises:
        ValueError: when a damaged checkpoint is read (with the newest older one that is whole), or one at a URL.
        OSError: when a checkpoint cannot be written, as on a full disk.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dia_lightning.callbacks import SafeCheckpointIO
        >>> trainer = Trainer(plugins=[SafeCheckpointIO()], accelerator="cpu", logger=False, enable_progress_bar=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what to write.
            path: where to.
            storage_options: none, as for Lightning's own.
        """
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        folder = Path(path).parent
        if folder not in self._cleared:
            self._cleared.add(folder)
            remove_parts([folder])
        _checkpoint_file.save(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: of the file.
            map_location: as for ``torch.load``.
            weights_only: ``False`` would run code from the file, and must be given to do so.
        """
        if "://" in os.fspath(path):
            raise ValueError(f"Checkpoint {path}: checkpoints are not loaded from URLs. Download it and give the file.")
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder, a sharded checkpoint: it needs the strategy that wrote it.")
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no checkpoint {os.fspath(path)!r}.")
        read: dict[str, Any] = _checkpoint_file.load(
            path, map_location=map_location, weights_only=weights_only is not False
        )
        return read
