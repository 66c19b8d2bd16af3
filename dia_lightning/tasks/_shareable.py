"""Tasks that are saved to folders, here and on the Hugging Face Hub, and loaded from there."""

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
    """What :class:`~dia_lightning.tasks.DIATask` offers to share a network without its checkpoint."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, metrics: Mapping[str, float] | None = None) -> Path:
        """Write the task to a folder that :meth:`from_pretrained` loads: weights, hyperparameters, a model card.

        Args:
            folder: where to; files of the same names are replaced, a ``README.md`` of your own is not.
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
        """Load a task, in evaluation mode, on the CPU and not compiled. No code is run and nothing else is read.

        Args:
            source: a folder that :meth:`save_pretrained` wrote, or a repository of the Hugging Face Hub, such as
                ``"user/network"``.
            revision: branch, tag or commit of a repository.
            token: for a private repository; by default that of ``hf auth login``.
            cache_dir: where downloads are kept.
            local_files_only: take what was downloaded before, and nothing else.
            **arguments: of the task, in place of those that were saved: objects, such as a backbone of your own, have
                to be given again.

        Returns:
            The task; ``DIATask.from_pretrained`` finds out of which class.

        Raises:
            ValueError: if the folder is damaged or holds another task, or an object is missing.
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
        """Put what :meth:`save_pretrained` writes into a repository of the Hugging Face Hub, made if need be.

        Args:
            repo_id: name of the repository, such as ``"user/network"``.
            private: whether a new repository is private; ``None`` for the default of the account.
            token: with the right to write; by default that of ``hf auth login``.
            commit_message: of the commit.
            metrics: for the model card; by default those of validation and test that the Trainer has.

        Returns:
            URL of the commit; nothing in processes of a distributed run but the first.

        Raises:
            ValueError: if the Hub does not take it.
            ImportError: if huggingface_hub or safetensors is not installed.
        """
        trainer = trainer_of(self)
        if trainer is not None and not trainer.is_global_zero:
            return ""  # another process does it

        def save(folder: Path) -> None:
            self.save_pretrained(folder, metrics=metrics)

        return upload(save, repo_id, private=private, token=token, commit_message=commit_message)
