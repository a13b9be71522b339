"""Signals that end a run.

In training a signal is noted, the step ends, and a checkpoint is saved. Before and after training
there is nothing to save: the process leaves at once. This module imports nothing that takes long,
so that scripts listen before PyTorch is loaded.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# 128 + the number, as a shell reports it. A batch system sends USR1 ahead of a time limit, and its
# script must tell "saved, start me again" from a death by USR1, which a shell reports as 138:
# 75 is EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_CODES = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
    signal.SIGHUP: 129,
    signal.SIGXCPU: 152,
    signal.SIGUSR1: 75,
}
AFTER_TRAINING = "after training, which is saved: start the same command again for the rest"

_Handler = Callable[[int, FrameType | None], object] | int | None

_process = 0  # the process that set the handlers
_received: signal.Signals | None = None
_is_breakable = False
_moment = "before training; nothing is lost: start the same command again"


class Stopped(Exception):
    """A signal has ended the training, and what was trained is saved."""

    def __init__(self, number: int, moment: str) -> None:
        super().__init__(describe(number, moment))
        self.code = EXIT_CODES[signal.Signals(number)]


class BrokenOff(BaseException):
    """A signal has ended the waiting for data."""


def describe(number: int, moment: str) -> str:
    """Return the line that a stopped run prints."""
    return f"stopped by {signal.Signals(number).name} {moment}"


def listen() -> None:
    """From now on, leave with one line and an exit code, without a traceback."""
    _handle(_leave)


def received() -> signal.Signals | None:
    """Return the signal that was noted in training, if any."""
    return _received


def forget() -> None:
    """Forget the signals of an earlier run in this process."""
    global _received
    _received = None


def set_moment(moment: str) -> None:
    """Set what the line of a process that leaves says about the moment."""
    global _moment
    _moment = moment


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Note signals instead of leaving; a second SIGINT leaves at once."""
    before = _handle(_note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def breakable(is_breakable: bool) -> Iterator[None]:
    """Let a signal that is noted here, or was before, raise `BrokenOff`."""
    global _is_breakable
    _is_breakable = is_breakable
    try:
        if is_breakable and _received is not None:
            raise BrokenOff
        yield
    finally:
        _is_breakable = False


def shield_worker(_: int = 0) -> None:
    """Ignore in a worker process what is meant for the run.

    A terminal and a batch system send a signal to every process of a job. A worker obeys SIGTERM of
    its parent only, with which the loader and `multiprocessing` end workers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _handle(handler: _Handler) -> dict[int, _Handler]:
    """Set the handler of every signal that ends a run, and return the handlers before."""
    global _process
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python handles signals in the main thread only
    _process = os.getpid()
    before: dict[int, _Handler] = {number: signal.getsignal(number) for number in EXIT_CODES}
    if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    return before


def _leave(number: int, _: FrameType | None) -> None:
    """Leave the process at once, whatever is being imported or computed."""
    if os.getpid() != _process:  # a process that was forked: its parent decides
        return
    if _received is None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"{describe(number, _moment)}\n".encode())
        os._exit(EXIT_CODES[signal.Signals(number)])
    if number == signal.SIGINT:
        os._exit(EXIT_CODES[signal.SIGINT])


def _note(number: int, _: FrameType | None) -> None:
    global _received
    if os.getpid() != _process:
        return
    if _received is not None:
        if number == signal.SIGINT:
            os._exit(EXIT_CODES[signal.SIGINT])
        return
    _received = signal.Signals(number)
    if _is_breakable:
        raise BrokenOff
