"""Standard output and standard error, also where they cannot be written to."""

import sys
from contextlib import suppress
from typing import TextIO


class LenientStream:
    """A text stream that loses what it cannot write, and raises nothing.

    The reader of a pipe may be gone, the disk full, the descriptor closed. Of a character that the
    encoding lacks, the escape sequence is written.

    Args:
        stream: such as `sys.stdout`; None where the program was started without one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write `text` if that is possible; returns its length in any case."""
        if self._stream is not None:
            with suppress(Exception):  # streams of notebooks and test runners raise what they like
                escaped = text.encode(self.encoding, "backslashreplace")
                self._stream.write(escaped.decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Write what was kept back, if that is possible."""
        if self._stream is not None:
            with suppress(Exception):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        if self._stream is not None:
            with suppress(Exception):
                return self._stream.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor, which a progress bar asks for the terminal's width."""
        if self._stream is None:
            raise OSError("no stream, hence no descriptor")
        return self._stream.fileno()


def say(text: str) -> None:
    """Print a line on standard output if that is possible."""
    print(text, file=LenientStream(sys.stdout), flush=True)


class OutputError(OSError):
    """Standard output cannot be written to: the disk is full, or a pipe has lost its reader."""


def tell(text: str) -> None:
    """Print a line on standard output.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        print(printable(text), flush=True)
    except OSError as error:
        raise OutputError(error.errno, error.strerror) from None


def printable(text: str) -> str:
    """Text with escapes for what a terminal would obey and for what file names have beyond text."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
