"""The entry point of `graphcaps` and `python -m graphcaps`."""

import sys


def main() -> int:
    """Run the program; say which package it lacks."""
    try:
        from graphcaps.cli import main as run
    except ModuleNotFoundError as error:
        print(
            f'graphcaps: the program needs {error.name}: pip install "graphcaps[train]"',
            file=sys.stderr,
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
