"""Saving tasks to folders, local or on the Hugging Face Hub, and loading them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning.pytorch import LightningModule

from dia_lightning._hub import fetch, upload
from dia_lightning.tasks._trainer import trainer_of

if TYPE_CHECKING:
    from dia_lightning.tasks.base import DIATask

Task = TypeVar("Task", bound="Shareable")


class Shareable(LightningModule):
    """Methods of :class:`~dia_lightning.tasks.DIATask` for sharing a network without its checkpoint."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, metrics: Mapping[str, float] | None = None) -> Path:
        """Write the task to a folder that :meth:`from_pretrained` loads: weights, hyperparameters, a model card.

        Args:
            folder: the folder to write to; replaces files of the same names, but not your own ``README.md``.
            metrics: for the model card; by default those of validation and test that the Trainer has.

        Returns:
            The folder.

        Raises:
            ValueError: if the folder is a file, or the weights are sharded.
            ImportError: if safetensors is not installed.
        """
        from dia_lightning.tasks._sharing import write  # which imports the class that inherits this one

        return write(cast("DIATask", self), folder, metrics)

    @classmethod
    def from_pretrained(
        cls: type[Task],
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Task:
        """Load a task in evaluation mode, on the CPU and not compiled. No code is run and nothing else is read.

        Args:
            source: a folder written by :meth:`save_pretrained`, or a Hugging Face Hub repository, such as
                ``"user/network"``.
            revision: branch, tag or commit of a repository.
            token: for a private repository; by default that of ``hf auth login``.
            cache_dir: where downloads are kept.
            local_files_only: only use files that are already downloaded.
            **arguments: of the task, overriding the saved ones: objects, such as a custom backbone, must be given
                again.

        Returns:
            The task; ``DIATask.from_pretrained`` determines its class.

        Raises:
            ValueError: if the folder is damaged or holds a different task, or an object is missing.
            ImportError: if safetensors, or for a repository huggingface_hub, is not installed.

        Example:
            >>> import tempfile
            >>> from dia_lightning.tasks import ClassificationTask, DIATask
            >>> task = ClassificationTask("cifar_resnet", 10, backbone_args={"depth": 11}, attention="dia-lstm")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = task.save_pretrained(folder)
            ...     loaded = DIATask.from_pretrained(folder)
            >>> type(loaded).__name__, loaded.num_classes
            ('ClassificationTask', 10)
        """
        from dia_lightning.tasks._sharing import read

        folder = fetch(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        task: Task = read(cast(Any, cls), folder, arguments)
        return task

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload task with dia-lightning",
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Push what :meth:`save_pretrained` writes to a Hugging Face Hub repository, creating it if needed.

        Args:
            repo_id: name of the repository, such as ``"user/network"``.
            private: whether a new repository is private; ``None`` for the default of the account.
            token: with write access; by default that of ``hf auth login``.
            commit_message: the commit message.
            metrics: for the model card; by default those of validation and test that the Trainer has.

        Returns:
            URL of the commit; empty in all but the first process of a distributed run.

        Raises:
            ValueError: if the Hub rejects it.
            ImportError: if huggingface_hub or safetensors is not installed.
        """
        trainer = trainer_of(self)
        if trainer is not None and not trainer.is_global_zero:
            return ""  # another process does it

        def save(folder: Path) -> None:
            self.save_pretrained(folder, metrics=metrics)

        return upload(save, repo_id, private=private, token=token, commit_message=commit_message)
