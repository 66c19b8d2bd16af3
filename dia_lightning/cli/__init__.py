"""The command line: LightningCLI's commands with this package's rules, and light commands beside it.

:mod:`~dia_lightning.cli.command` has the former, ``commands/`` a file for each of the latter. What both do with options
is in ``parsing/``, what they do with checkpoints and the folders of runs in ``runs/``. The light commands import
Lightning as late as they can.
"""

#: Those of Lightning's command line.
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
#: The others; each is the name of its module in ``commands/``, in which ``run`` is what it does.
LIGHT_COMMANDS = ("configs", "models", "sites", "check", "export", "sample", "analyze", "reproduce")
#: Those that need no more than torch and torchvision.
CORE_COMMANDS = ("configs", "models")
COMMANDS = (*TRAINER_COMMANDS, *LIGHT_COMMANDS)
