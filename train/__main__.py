"""`python -m pmf.train`: the entry point for torchrun too."""

import os
import sys

from pmf.train.start import main


def run() -> int:
    """Run the command line and return its exit status."""
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    status = run()  # which flushes the output
    if "LOCAL_RANK" in os.environ:
        # PyTorch's caches keep process groups alive after they are destroyed, and the groups' threads can abort
        # Python's shutdown: skip it.
        os._exit(status)
    sys.exit(status)
