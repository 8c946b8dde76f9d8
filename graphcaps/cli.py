"""The program from its command line to its exit status.

Help must not wait for torch: only `_run` imports what the commands need.
"""

import errno
import io
import logging
import os
import signal
import sys
import traceback
from contextlib import suppress

from graphcaps import __version__, _interrupt
from graphcaps.flags import Program, parse
from graphcaps.streams import OutputError, printable, tell


def main() -> int:
    """Run the program; returns its exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not every encoding has all characters
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            status = _answer(sys.argv[1:])
        except SystemExit as stop:  # help was asked for, or flags are wrong
            status = int(stop.code or 0)
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "interrupted")
        return 130
    except OSError as error:
        # what is left in the buffer would be tried, and complained about, at the program's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE
        _complain(f"standard output: {error.strerror}")
        return 1
    return status


def _answer(arguments: list[str]) -> int:
    if "--version" in arguments:
        tell(f"graphcaps {__version__}")
        return 0
    return _run(parse(arguments))


def _run(program: Program) -> int:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("graphcaps").setLevel(logging.INFO)  # what is fetched, and from where
    try:
        from graphcaps import commands

        _interrupt.restore()
        commands.run(program.command)
    except OutputError:
        raise
    except Exception as error:
        if program.traceback:
            traceback.print_exc()
        _complain(_message(error))
        return 1
    return 0


def _complain(message: str) -> None:
    who = f"graphcaps[{os.environ['RANK']}]" if "RANK" in os.environ else "graphcaps"
    with suppress(OSError):  # there is nobody else to complain to
        print(f"{who}: {printable(message)}", file=sys.stderr, flush=True)


def _message(error: Exception) -> str:
    match error:
        case OSError(strerror=str(reason)):
            return f"{error.filename}: {reason}" if error.filename else reason
        case ValueError() | OSError() | RuntimeError():
            return str(error)
        case ModuleNotFoundError(name=str(name)):
            return f'this needs {name}: pip install "graphcaps[train]"'
        case ImportError():
            return str(error)
        case MemoryError():
            return f"out of memory ({error})" if str(error) else "out of memory"
    first_line = str(error).partition("\n")[0]
    return (
        f"{type(error).__name__}: {first_line}\n"
        "This should not have happened; add --traceback to see where it did"
    )
