"""The programs as processes: standard streams that may be closed, full or without a reader; signals; exit statuses.

Only the standard library is imported here, so that a signal that arrives while all else is imported finds its handler.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

DIVERGED, USAGE_ERROR, FAULT = 1, 2, 70
"""Exit statuses, beside 0 and, after a signal, 128 + its number: training diverged; input that cannot be used; a fault
of the program itself, as sysexits.h has it."""


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py`; returns its exit status."""
    return _run("train.py", arguments)


def generate(arguments: Sequence[str] | None = None) -> int:
    """`generate.py`; returns its exit status."""
    return _run("generate.py", arguments)


def export(arguments: Sequence[str] | None = None) -> int:
    """`rnn.export`; returns its exit status."""
    return _run("rnn.export", arguments)


def look(arguments: Sequence[str] | None = None) -> int:
    """`rnn.look`; returns its exit status."""
    return _run("rnn.look", arguments)


def _run(program: str, arguments: Sequence[str] | None) -> int:
    """Run a command with streams that cannot fail it. Ctrl-C, SIGTERM and SIGHUP end it by a KeyboardInterrupt where it
    does not handle them itself, and an error that it does not expect is reported as a fault of its own."""
    _occupy_streams()
    stderr = Lossy(sys.stderr)
    try:
        with contextlib.redirect_stderr(stderr), handled(_raise_stopped, stop_numbers()[1:]):
            try:
                with ended_at_once():
                    from char_gru.rnn import commands

                return getattr(commands, program.removeprefix("rnn.").removesuffix(".py"))(arguments)
            except Exception as error:  # noqa: BLE001 what nobody has foreseen
                if stop := _interrupted(error):
                    raise stop from None
                traceback.print_exc()
                print(f"{program}: this is a fault of the program, not of its input; please report the lines above",
                      file=sys.stderr)
                return FAULT
    except KeyboardInterrupt as stop:
        print(file=stderr)
        return status_after(stop)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP has arrived."""


def stop_numbers() -> list[int]:
    """The signals that end a program in order: SIGINT, SIGTERM, and SIGHUP unless nohup or a shell has it ignored."""
    return [signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)]


def status_after(stop: KeyboardInterrupt) -> int:
    """The exit status after a signal that ended the program."""
    return 128 + (stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def handled(handler: Callable, numbers: list[int]) -> Iterator[None]:
    """A block in which a function handles signals."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def ended_at_once() -> contextlib.AbstractContextManager[None]:
    """A block in which a signal ends the process without an exception, which a module that is just being imported may
    swallow or show; the block writes nothing."""
    return handled(lambda number, frame: os._exit(128 + number), stop_numbers())


def _interrupted(error: BaseException | None) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that an error arose from, as in libraries that clean up what is not there yet."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _raise_stopped(number: int, frame: object) -> None:
    raise Stopped(number)


class Lossy:
    """A text stream that drops what cannot be written, so that a program outlives the readers of its messages.

    stream: None, as Python has it for a stream that was closed when the program started, drops everything.
    """

    def __init__(self, stream: io.TextIOBase | None) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 open until the program ends

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _occupy_streams() -> None:
    """Open what is closed of the descriptors 0, 1 and 2, or the next file that is opened would take their place, and a
    library's messages would be written into it. `sys.stdin` and `sys.stdout` stay None, so that a program can tell."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one


def _settle(stream: io.TextIOBase | None) -> None:
    """Give up what a stream still holds and cannot write; Python would end with a message and a status of its own."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
