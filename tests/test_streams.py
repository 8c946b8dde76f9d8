"""Output to broken streams, while the process runs and at its exit."""

import contextlib
import io
import os

import pytest

from graphcaps.streams import LenientStream, say


def text_stream(descriptor, encoding="utf-8"):
    return io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding, line_buffering=True)


@pytest.fixture(params=["full disk", "broken pipe", "closed", "closed descriptor", "none"])
def dead(request):
    if request.param == "none":
        yield None
        return
    if request.param == "broken pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    stream = text_stream(writer)
    if request.param == "closed":
        stream.close()
    if request.param == "closed descriptor":
        os.close(writer)
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def test_a_dead_stream_takes_everything_and_raises_nothing(dead):
    lenient = LenientStream(dead)
    assert lenient.write("a line\n") == 7
    lenient.flush()
    assert not lenient.isatty()
    print("text longer than any buffer" * 10_000, file=lenient, flush=True)


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", r"2 \xd7 3 \u6570\udcff"),
        ("koi8-r", r"2 \xd7 3 \u6570\udcff"),
        ("utf-8", r"2 × 3 数\udcff"),
    ],
)
def test_characters_that_the_encoding_lacks_are_escaped(encoding, written):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding)
    LenientStream(stream).write("2 × 3 数\udcff")
    stream.flush()
    assert content.getvalue().decode(encoding) == written


def test_a_stream_that_works_is_written_as_ever(capsys):
    say("one\ntwo")
    assert capsys.readouterr().out == "one\ntwo\n"
