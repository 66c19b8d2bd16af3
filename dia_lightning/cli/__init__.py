"""The command line: LightningCLI's commands with this package's rules, and light commands next to them.

:mod:`~dia_lightning.cli.command` has the former, ``commands/`` a file for each of the latter. Both use ``parsing/`` for
options and ``runs/`` for checkpoints and run folders. The light commands import Lightning as late as possible.
"""

#: Those of Lightning's command line.
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
#: The others; each is the name of its module in ``commands/``, whose ``run`` executes it.
LIGHT_COMMANDS = ("configs", "models", "sites", "check", "export", "sample", "analyze", "reproduce")
#: Those that need only torch and torchvision.
CORE_COMMANDS = ("configs", "models")
COMMANDS = (*TRAINER_COMMANDS, *LIGHT_COMMANDS)
