"""The entry point of `graphcaps` and `python -m graphcaps`."""

import sys

from graphcaps import _interrupt


def main() -> int:
    """Run the program; say what is missing where only the library is installed."""
    try:
        from graphcaps import cli
    except ModuleNotFoundError as error:
        print(
            f'graphcaps: the program needs {error.name}: pip install "graphcaps[train]"',
            file=sys.stderr,
        )
        return 1
    _interrupt.restore()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
