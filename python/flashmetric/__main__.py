# SPDX-License-Identifier: Apache-2.0
"""Command line: ``python -m flashmetric info`` and ``python -m flashmetric train``."""

import argparse
import sys
from collections.abc import Sequence

from flashmetric import _library


def _print_info() -> None:
    for key, value in _library.describe().items():
        if isinstance(value, dict):
            for name, entry in value.items():
                print(f"{key}.{name}: {entry}")
        else:
            print(f"{key}: {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments after the program's name; ``sys.argv`` if None.

    Returns:
        Exit status of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m flashmetric", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backend, instruction set and CUDA state")
    # The demo parses its own options, --help among them: its module needs packages of the `demo`
    # extra and must not be imported for the other commands.
    commands.add_parser("train", help="train the demo network", add_help=False)
    args, rest = parser.parse_known_args(argv)
    if args.command == "train":
        from flashmetric.demo.train import main as train

        return train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _print_info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
