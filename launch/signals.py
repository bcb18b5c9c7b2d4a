"""The person at the terminal: signals, questions, and lines that are printed even where nobody reads them."""

import os
import select
import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import TextIO

from launch.exit_codes import Stopped, TerminateNow


class Signals:
    """INT, TERM and HUP. The first asks for an orderly end, another one to terminate now.

    The kernel, a shell and a login manager may each send one when a terminal is closed: a second one is Ctrl-C, or a
    TERM after a TERM, and not within half a second. Where HUP is ignored (nohup) it stays so.
    """

    def __init__(self):
        self.count, self.first, self.kind, self.protected = 0, 0.0, None, False

    def install(self) -> "Signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._received)
        return self

    def _received(self, number, frame) -> None:
        if not self.count:
            self.count, self.first, self.kind = 1, time.monotonic(), number
            self._tell("stopping in order; Ctrl-C again terminates now and loses what is not fetched")
        elif number in (signal.SIGINT, self.kind) and number != signal.SIGHUP:
            if self.count == 1 and time.monotonic() - self.first > 0.5:
                self.count = 2
                self._tell("terminating now")

    def _tell(self, line: str) -> None:
        if not self.protected:
            with suppress(OSError):  # no terminal
                os.write(2, f"\n{line}\n".encode())  # print may just be at work

    @contextmanager
    def none(self):
        """Inside, nothing is interrupted: a request that costs money, or the one that ends the costs."""
        before, self.protected = self.protected, True
        try:
            yield
        finally:
            self.protected = before

    def check(self, patient: bool = False) -> None:
        """Raises what was asked for; `patient` where a first signal is answered by somebody else."""
        if self.protected:
            return
        if self.count > 1:
            raise TerminateNow
        if self.count and not patient:
            raise Stopped("stopped by a signal")


def show(text: str, stream: TextIO | None) -> None:
    """Prints if that is possible: a terminal that is gone, or a full disk, must not keep us from terminating."""
    with suppress(OSError):
        if stream is not None:  # closed in the shell
            stream.write(text)
            stream.flush()


def drop_unprinted() -> None:
    """Python tries once more when it ends, and that would change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clock_time(epoch: float) -> str:
    day = "%H:%M" if time.strftime("%x") == time.strftime("%x", time.localtime(epoch)) else "%a %H:%M"
    return time.strftime(day, time.localtime(epoch))


def wants_to_detach(signals: Signals, deadline: float, seconds: float = 15) -> bool:
    """Asks the person at the terminal; silence, or another Ctrl-C, means no."""
    show(
        f"\nCtrl-C: [s]top training, fetch, terminate, or [d]etach and leave it running until {clock_time(deadline)} "
        f"at the latest? s in {seconds:.0f} s: ",
        sys.stdout,
    )
    until = time.monotonic() + seconds
    while signals.count < 2 and (left := until - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], min(0.2, left))[0]:
            return sys.stdin.readline().strip().lower().startswith("d")
    show("\n", sys.stdout)
    return False
