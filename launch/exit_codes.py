"""How a rental can end other than by its training's own exit code; lambda_service.py lists the codes."""


class Ending(ValueError):
    """Says why, on one line; `code` is what the program exits with."""

    code = 92  # the machine failed


class NothingLaunched(Ending):
    code = 91


class MachineLost(Ending):
    code = 92


class OutOfTime(Ending):
    code = 93


class NotFetched(Ending):
    code = 94


class Stopped(Ending):
    code = 130  # as after Ctrl-C


class StillRunning(Ending):
    """A machine may go on costing money. The only ending that a script must not ignore."""

    code = 90


class TerminateNow(BaseException):
    """A person has asked twice: no fetching any more."""


class Detached(Exception):
    """The person leaves; the watchdog goes on."""
