"""Ends the program in one line when Ctrl-C comes while it is still importing."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    # not by an exception: some imports catch those, and others print them
    try:
        os.write(2, b"graphcaps: interrupted\n")
    finally:
        os._exit(128 + number)


def _is_program() -> bool:
    """Whether graphcaps is imported to be run, as `graphcaps` or `python -m graphcaps`."""
    # Python has the name "-m" there while it looks for the module
    started = Path(sys.argv[0]).name if sys.argv else ""
    return started == "graphcaps" or (started == "-m" and "graphcaps" in sys.orig_argv)


def end_in_one_line() -> None:
    """Let Ctrl-C end the program at once, where graphcaps is run and not imported by others."""
    if (
        _is_program()
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _leave)


def restore() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again; the program calls this when all is imported."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
