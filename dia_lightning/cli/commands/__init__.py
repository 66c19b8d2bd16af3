"""The commands of the program. Those beside Lightning's have a module here, in which ``run`` is what they do."""

#: Those of Lightning's command line.
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
#: The others; each is the name of its module.
LIGHT_COMMANDS = ("configs", "models", "sites", "check", "export", "sample", "analyze", "reproduce")
#: Those that need no more than torch and torchvision.
CORE_COMMANDS = ("configs", "models")
COMMANDS = (*TRAINER_COMMANDS, *LIGHT_COMMANDS)
