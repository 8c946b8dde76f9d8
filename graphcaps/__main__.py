"""The entry point of `graphcaps` and `python -m graphcaps`."""

import sys

from graphcaps import _interrupt


def main() -> int:
    """Run the program."""
    from graphcaps import cli

    _interrupt.restore()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
