"""The commands of the program."""

#: Those that do without Lightning, and the module of each.
LIGHT_COMMANDS = {
    "configs": "configs",
    "models": "networks",
    "sites": "sites",
    "check": "check",
    "export": "export",
    "sample": "sample",
    "analyze": "analyze",
    "reproduce": "reproduce",
}
#: Those that need no more than torch and torchvision.
CORE_COMMANDS = ("configs", "models")
#: Those of Lightning's command line.
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINER_COMMANDS, *LIGHT_COMMANDS)
