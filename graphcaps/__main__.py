"""The entry point of `graphcaps` and `python -m graphcaps`."""

import sys


def main() -> int:
    """Run the program; say what a command needs that the bare package does not bring."""
    try:
        from graphcaps import cli

        return cli.main()
    except ModuleNotFoundError as error:
        print(
            f'graphcaps: this needs {error.name}: pip install "graphcaps[train]"',
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
