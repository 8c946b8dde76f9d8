"""The threads in which the CPU kernel runs."""

import multiprocessing
import signal
import threading
import time

import pytest
import torch

import graphcaps as gc
from graphcaps.kernels.cpu import threads

NEEDS_OPENMP = pytest.mark.skipif(
    threads._openmp() is None, reason="torch is not linked to an OpenMP with GOMP_parallel"
)


@pytest.fixture
def two_threads(set_threads):
    """As many threads for torch, whatever the machine has."""
    set_threads(2)


@pytest.fixture(params=[pytest.param("openmp", marks=NEEDS_OPENMP), "without openmp"])
def either(request, monkeypatch, two_threads):
    """With the threads of torch's OpenMP, and with threads of our own."""
    if request.param != "openmp":
        monkeypatch.setattr(threads, "_openmp", lambda: None)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
def test_every_call_is_made_once(either, count):
    made = []
    threads.run(lambda *arguments: made.append(arguments), [(n, "x") for n in range(count)])
    assert sorted(made) == [(n, "x") for n in range(count)]


def test_calls_run_at_the_same_time(either):
    meeting = threading.Barrier(2, timeout=60)
    threads.run(meeting.wait, [(), ()])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_of_any_call_ends_the_run(either):
    def fail(number):
        if number == 3:
            raise ValueError("three")

    with pytest.raises((ValueError, RuntimeError), match=r"three|exception printed above"):
        threads.run(fail, [(n,) for n in range(4)])


class AlarmError(Exception):
    """Raised by a signal handler."""


def _raise_alarm(*_):
    raise AlarmError


@NEEDS_OPENMP
def test_no_exception_of_a_signal_handler_is_lost(two_threads):
    layer = gc.CapsuleLayer(gc.complete_graph(1152, 10), 8, 16, engine="fused")
    u = torch.rand(64, 1152, 8)
    expected = layer(u)
    before = signal.signal(signal.SIGALRM, _raise_alarm)
    try:
        for shot in range(40):
            signal.setitimer(signal.ITIMER_REAL, 0.003 + 0.0005 * shot)
            with pytest.raises(AlarmError):  # noqa: PT012, the loop is what is interrupted
                for _ in range(1000):
                    assert torch.equal(layer(u), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@NEEDS_OPENMP
def test_the_threads_are_those_of_torch(two_threads):
    x = torch.rand(1 << 20)
    x + x  # a parallel operation starts torch's threads
    seen = set()

    def meet(meeting):
        seen.add(threading.get_native_id())
        meeting.wait()

    for _ in range(20):
        meeting = threading.Barrier(2, timeout=60)
        threads.run(meet, [(meeting,), (meeting,)])
        x + x
    assert len(seen) == 2


def _in_child(_):
    made = []
    threads.run(made.append, [(n,) for n in range(4)])
    return sorted(made)


def test_a_forked_process_has_threads_of_its_own(two_threads):
    _in_child(0)  # starts OpenMP's threads, which a forked process lacks
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_in_child, (0,)).get(timeout=60) == [0, 1, 2, 3]


def test_several_threads_may_run_calls_at_once(either):
    def add(total, number):
        time.sleep(0.001)
        total.append(number)

    totals = [[] for _ in range(4)]
    callers = [
        threading.Thread(target=threads.run, args=(add, [(total, n) for n in range(8)]))
        for total in totals
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [sorted(total) for total in totals] == [list(range(8))] * 4
