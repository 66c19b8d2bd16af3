"""The command line: LightningCLI's commands with this package's rules, and light commands beside it.

``dia_lightning.cli.command`` imports Lightning, the other modules do without it as far as they can.
"""
