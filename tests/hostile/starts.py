"""Starts the program cheaply: one process imports it, and each start is a fork of that process.

A start can receive a signal at its n-th call that writes, and can have broken standard streams.
"""

import builtins
import io
import json
import os
import signal
import subprocess
import sys

THOROUGH = bool(os.environ.get("GRAPHCAPS_HOSTILE"))  # all of the cases, not some of them
PATIENCE = 60  # seconds of a start
WRITING = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


class Starts:
    """The process that forks; it replaces the preset `small` by a tiny net."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_):
        self.process.kill()  # it has nothing to save
        self.process.communicate()

    def __call__(
        self, *arguments, stdout=os.devnull, stderr=os.devnull, encoding="utf-8", at=0, number=9
    ):
        """Run the program.

        Args:
            arguments: of its command line.
            stdout: a file; "broken pipe"; None to close the descriptor. Likewise `stderr`.
            encoding: of both.
            at: at which call that writes the signal comes; never, if 0.
            number: of the signal.

        Returns:
            Its exit status, or minus the number of the signal that ended it; and how many calls
            it made that write, 0 if it was killed.
        """
        request = dict(
            arguments=list(map(str, arguments)),
            streams=[stdout and str(stdout), stderr and str(stderr)],
            encoding=encoding,
            at=at,
            number=int(number),
        )
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class _Halving:
    """A file of which only half a write has happened when a signal arrives."""

    def __init__(self, file, calls):
        self._file, self._calls = file, calls

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content):
        half = len(content) // 2
        self._file.write(content[:half])
        self._file.flush()
        self._calls.count()
        self._file.write(content[half:])
        return len(content)


class _Calls:
    """Counts calls that write, and sends a signal to this process at one of them."""

    def __init__(self, at, number):
        self.at, self.number, self.made = at, number, 0
        for name in WRITING:
            setattr(os, name, self._counted(getattr(os, name)))
        io.open = builtins.open = self._opening(io.open)

    def count(self):
        self.made += 1
        if self.made == self.at:
            os.kill(os.getpid(), self.number)

    def _counted(self, function):
        def call(*arguments, **named):
            self.count()
            return function(*arguments, **named)

        return call

    def _opening(self, function):
        def call(file, mode="r", *arguments, **named):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return function(file, mode, *arguments, **named)
            self.count()
            return _Halving(function(file, mode, *arguments, **named), self)

        return call


def _redirect(descriptor, name, encoding):
    if name is None:
        os.close(descriptor)
        return None
    if name == "broken pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(writer, descriptor)
    os.close(writer)
    return open(descriptor, "w", encoding=encoding)


def _start(program, request, told):
    signal.alarm(PATIENCE)
    sys.argv = ["graphcaps", *request["arguments"]]
    stdout, stderr = request["streams"]
    sys.stdout = sys.__stdout__ = _redirect(1, stdout, request["encoding"])
    sys.stderr = sys.__stderr__ = _redirect(2, stderr, request["encoding"])
    calls = _Calls(request["at"], request["number"])
    status = program()
    os.write(told, json.dumps(calls.made).encode())
    os._exit(status)


def _serve():
    import torch

    from graphcaps import cli, engines
    from graphcaps.nets import model

    torch.set_num_threads(1)
    # both import much when they are first used
    torch.optim.Adam([torch.zeros(1)])
    engines.choose("auto", torch.device("cpu"))
    model.PRESETS["small"] = model.CapsNetConfig(
        conv_channels=4, capsule_maps=1, decoder_hidden=(8,)
    )
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        hears, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                _start(cli.main, json.loads(line), told)
            finally:
                os._exit(99)  # an exception that the program did not catch
        os.close(told)
        calls = os.read(hears, 100)
        os.close(hears)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(json.dumps([status, json.loads(calls or b"0")]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
