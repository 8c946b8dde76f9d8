"""Writing to standard output and standard error, even if they are closed or broken."""

import sys
from contextlib import suppress
from typing import TextIO


class LenientStream:
    """A text stream that discards text that it cannot write, and raises no errors.

    The reader of a pipe may have closed it, the disk may be full, or the descriptor closed. If the
    encoding lacks a character, its escape sequence is written.

    Args:
        stream: a stream such as `sys.stdout`; None if the program was started without one.
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
        """Flush the stream, if that is possible."""
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
    """Escape control characters, and bytes of file names that are not valid text."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
