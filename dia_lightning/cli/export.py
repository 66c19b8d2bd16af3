"""The command ``export``: a network as a file that runs elsewhere."""

import argparse
from collections.abc import Sequence

from dia_lightning.cli import _network_argument
from dia_lightning.models import export_network


def run(args: Sequence[str]) -> None:
    """Write the file, compare outputs, and print how to load it.

    Args:
        args: arguments of the command, without its name.
    """
    parser = argparse.ArgumentParser(
        "dia-lightning export", description="Write a network to a file that runs elsewhere."
    )
    _network_argument.add_arguments(parser)
    parser.add_argument("path", help="where to: NAME.onnx, NAME.pt2 (torch.export) or NAME.safetensors (weights only)")
    options = parser.parse_args(args)
    network, images = _network_argument.network_and_images(options, batch=2)
    exported = export_network(network, images, options.path)
    print(f"{exported.path}: largest difference to the network's own output {exported.difference:.1e}\n")
    print(exported.snippet)
