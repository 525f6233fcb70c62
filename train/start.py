"""The script `pmf`. It imports nothing slow where Ctrl-C would not be caught: PyTorch takes seconds."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from pmf.train.cli import main as run
    except KeyboardInterrupt:
        print("pmf: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
