"""The command ``check``: which properties hold for a network with attention."""

import argparse
from collections.abc import Sequence

from dia_lightning.attention import check
from dia_lightning.cli.commands import _network_argument


def run(args: Sequence[str]) -> None:
    """Print the table of :func:`dia_lightning.attention.check`; exit with code 1 if any check fails.

    Args:
        args: arguments of the command, without its name.
    """
    parser = argparse.ArgumentParser("dia-lightning check", description="Check a network with attention.")
    _network_argument.add_arguments(parser)
    parser.add_argument("--slow", action="store_true", help="also compile the network, which takes a minute or more")
    options = parser.parse_args(args)
    network, images = _network_argument.network_and_images(options, batch=2)
    report = check(network, images, slow=options.slow)
    print(report)
    if not report.ok:
        raise SystemExit(1)
