"""The life of one rented machine: launch, prepare, train, fetch, terminate, and make sure that it is gone.

    rental = Rental(api, ledger, run, signals)
    with ledger.hold(run.name):
        # blocks for hours, and terminates whatever happens in between
        exit_code = rental.live(offers, wait_minutes, files, secrets)

What happens is written down before it is done (launch/run_store.py), and every step can be repeated, so that whoever takes over
goes on where the last process was cut off. Two processes know of a machine:

    the service     holds the run's lock, does the work, and terminates the machine at the end
    the watchdog    outlives the terminal. Where the lock is free it takes over: a training that runs is followed to
                    its end, anything before is terminated. Three minutes after the deadline it terminates, lock or not,
                    and it does not stop trying

What neither can cover: both machines dead, or this one without a network. The service has no time to live and goes on
billing until it is asked to terminate; shutting the machine down from inside does not end that.
"""

import ipaddress
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch.exit_codes import (
    Detached,
    Ending,
    MachineLost,
    NotFetched,
    NothingLaunched,
    OutOfTime,
    StillRunning,
    Stopped,
    TerminateNow,
)
from launch.lambda_api import (
    CONSOLE,
    Api,
    ApiError,
    Instance,
    InstanceType,
    NoCapacity,
    Refused,
    Unanswered,
    launch_body,
    redact,
)
from launch.remote import Cancelled, ConnectionLost, HostKeyChanged, Machine, MachineError, Poll
from launch.run_store import Ledger, Run
from launch.signals import Signals, clock_time, show, wants_to_detach

ROOT = Path(__file__).resolve().parents[1]
MINUTE, HOUR = 60, 3600
TAG = "nanogpt-dag-run"  # of every machine launched here; its value is the run's name

Offer = tuple[InstanceType, str]  # a type and a region that has one


def remote_folder(name: str) -> str:
    return f"nanogpt-dag/{name}"


class Rental:
    """One run, and what is known about it; `run` is always the newest state."""

    def __init__(self, api: Api, ledger: Ledger, run: Run, signals: Signals, echo: bool = True):
        self.api, self.ledger, self.run, self.signals, self.echo = api, ledger, run, signals, echo
        self.clock, self.machine, self.troubles, self.misses = api.clock, None, 0, 0
        self.interruptible = False  # whether a first signal breaks off ssh, though the training has begun
        self.ssh_until = 0.0  # when what runs over ssh is broken off, where not at the deadline

    # ------------------------------------------------------------------------------------ small things

    def update(self, **changes) -> None:
        """A full disk must not keep us from terminating: memory knows, and the next update tries again."""
        self.run = replace(self.run, **changes)
        try:
            self.ledger.save(self.run)
        except OSError as error:
            warning = ": do not end this program by force" if self.run.launched else ""
            self.say(f"the ledger cannot be written ({error.strerror}){warning}")

    def say(self, line: str) -> None:
        line = redact(f"{time.strftime('%H:%M:%S')} {line}")
        self.write("service.log", f"{line}\n".encode())
        if self.echo:
            show(f"{line}\n", sys.stdout)

    def say_mistake(self) -> None:
        """The traceback of a mistake of ours, wherever it can still be written."""
        text = redact(traceback.format_exc())
        self.write("service.log", text.encode())
        show(text, sys.stderr)

    def write(self, name: str, data: bytes) -> None:
        try:
            with open(self.ledger.path(self.run.name, name), "ab") as file:
                file.write(data)
        except OSError:
            return  # a full disk; the terminal has it, and for train.log the machine does

    def pause(self, seconds: float, patient: bool = False) -> None:
        until = self.clock.after(seconds)
        while (left := until - self.clock.now()) > 0:
            self.signals.check(patient)
            time.sleep(min(0.2, left))
        self.signals.check(patient)

    @property
    def cost(self) -> float:
        """Dollars so far, counted from the request; the service bills from the first healthy minute."""
        if self.run.launched < self.run.created:  # never, or by somebody else
            return 0.0
        return self.clock.seconds_since(self.run.launched) / HOUR * self.run.price

    def so_far(self) -> str:
        return f"{self.clock.seconds_since(self.run.launched) / MINUTE:.0f} min, ${self.cost:.2f} so far"

    # ------------------------------------------------------------------------------------------- launch

    def launch(self, offers: Callable[[], Iterable[Offer]], wait_minutes: float) -> None:
        """A machine of the first offer that is really to be had."""
        until = self.clock.after(wait_minutes * MINUTE)
        while True:
            problem = NothingLaunched("no capacity anywhere: see --instance, --region and --wait-capacity")
            try:
                for kind, region in offers():
                    self.signals.check()
                    try:
                        return self.request(kind, region)
                    except NoCapacity:
                        self.say(f"no capacity for {kind.name} in {region}")
            except Unanswered as error:  # of a question; `request` sees to an unanswered launch itself
                problem = error
            if self.clock.now() >= until:
                raise problem
            self.say(f"{problem}; looking again in half a minute")
            self.pause(30)

    def request(self, kind: InstanceType, region: str) -> None:
        """Asks once. Where the answer is lost, looks for the machine instead of asking again."""
        price = kind.price_cents_per_hour / 100
        hours = min(
            self.run.max_hours, self.run.max_cost / price if self.run.max_cost else self.run.max_hours
        )
        present = [machine.id for machine in self.api.instances()]
        wanted = dict(
            name=self.run.name,
            region=region,
            instance_type=kind.name,
            ssh_key=self.run.ssh_key,
            tags={TAG: self.run.name},
            image_family=self.run.image_family or self.newest_stack(kind, region),
            file_systems=self.run.file_systems,
        )
        launch_body(**wanted)  # what is wrong with it is found before it counts as launched
        self.signals.check()
        if not self.is_watched():
            raise NothingLaunched("without a watchdog nothing is launched")
        intent = replace(
            self.run,
            **dict(phase="launching", instance_type=kind.name, region=region, gpus=kind.gpus, price=price),
            **dict(launched=self.clock.now(), deadline=self.clock.after(hours * HOUR), strangers=present),
            stop_at=self.clock.after(hours * HOUR - min(10 * MINUTE, hours * HOUR / 10)),
        )
        try:
            self.run = self.ledger.save(intent)  # nobody could find what nobody has written down
        except OSError as error:
            raise NothingLaunched(f"the ledger cannot be written: {error.strerror}") from None
        self.say(f"launching {kind.name} in {region} as {self.run.name}")
        with self.signals.none():
            try:
                machine_id = self.api.launch(**wanted)
            except Refused:
                self.update(phase="planned", launched=0.0)
                raise
            except Unanswered as error:
                self.say(f"the answer to the launch was lost ({error}): looking for the machine by its name")
                self.update(adopted=True)
                machine_id = self.adopt()
            self.update(phase="booting", instance_id=machine_id)

    def newest_stack(self, kind: InstanceType, region: str) -> str | None:
        """Images differ between regions unless their family is named."""
        processor = "arm64" if "gh200" in kind.name else "x86_64"
        images = [image for image in self.api.images() if image.region == region]
        families = [image.family for image in images if image.architecture == processor]
        return max((family for family in families if family.startswith("lambda-stack")), default=None)

    def ours(self) -> list[Instance]:
        """Machines that can only have come from our request, whatever we were answered."""
        run = self.run
        found = [machine for machine in self.api.instances() if machine.id not in run.strangers]
        found = [m for m in found if m.id == run.instance_id or m.name == run.name]
        return [machine for machine in found if machine.status != "terminated"]

    def adopt(self) -> str:
        """The id of the one machine that has our name; it may take a while to be listed."""
        until = self.clock.after(3 * MINUTE)
        while self.clock.now() < until:
            self.clock.sleep(5)
            try:
                found = self.ours()
            except ApiError as error:
                self.say(str(error))
                continue
            if len(found) > 1:
                raise MachineLost(f"{len(found)} machines came of one request: none is used")
            if found:
                return found[0].id
        raise MachineLost("the launch was never answered, and no machine of that name is listed")

    # ------------------------------------------------------------------------------------------ prepare

    def wait_active(self) -> str:
        """Its address."""
        until = self.run.launched + self.clock.second * self.run.boot_timeout * MINUTE
        until = min(until, self.run.deadline)
        while True:
            try:
                machine = self.api.instance(self.run.instance_id)
                self.require_alive(machine)
                if machine and machine.status == "active" and machine.ip:
                    return str(ipaddress.ip_address(machine.ip))  # it will stand on a command line
            except Unanswered as error:
                self.trouble(error)
            if self.clock.now() > until:
                minutes = self.clock.seconds_since(self.run.launched) / MINUTE
                raise MachineLost(f"not active after {minutes:.0f} min")
            self.pause(5)

    def require_alive(self, machine: Instance | None) -> None:
        if machine is None and self.clock.seconds_since(self.run.launched) < 3 * MINUTE:
            return  # not listed yet
        status = machine.status if machine else "gone"
        if status not in ("booting", "active"):
            raise MachineLost(f"the machine is {status}")

    def connect(self) -> Machine:
        folder = self.ledger.path(self.run.name)
        if not self.run.address:
            self.update(address=self.wait_active())
        return Machine(
            host=self.run.address,
            identity=Path(self.run.identity) if self.run.identity else None,
            known_hosts=folder / "known_hosts",
            folder=remote_folder(self.run.name),
            clock=self.clock,
            say=self.say,
            cancelled=self.cancelled,
        )

    def cancelled(self) -> bool:
        """Whether what runs over ssh now should be broken off."""
        if self.signals.protected:
            return False
        if self.interruptible and self.clock.now() > self.run.stop_at:
            return True
        wanted = 2 if self.run.started and not self.interruptible else 1
        return self.signals.count >= wanted or self.clock.now() > (self.ssh_until or self.run.deadline)

    def prepare(self, files: list[str], secrets: dict[str, str]) -> None:
        """Everything may be there already, from a process that was cut off."""
        self.say(f"waiting for {self.run.instance_type} {self.run.instance_id} to boot")
        self.machine = self.connect()
        self.update(phase="preparing")
        self.machine.wait_reachable(self.run.launched + self.clock.second * self.run.boot_timeout * MINUTE)
        self.say(f"uploading {len(files)} files")
        self.insist(self.machine.upload, ROOT, files)
        for name, value in secrets.items():
            self.insist(self.machine.secret, name, value)
        self.say("installing what training needs")
        try:
            self.say(self.insist(self.machine.setup, device=self.run.device))
        except MachineError:
            self.keep_setup_log()
            raise
        self.signals.check()
        self.insist(self.machine.start, self.run.arguments, self.run.gpus)
        self.update(phase="training", started=self.clock.now())
        self.say(f"training: {' '.join(self.run.arguments)}")

    def keep_setup_log(self) -> None:
        """Its end says why it failed, and the machine will be gone."""
        with suppress(MachineError):
            end = self.machine.ssh(f"tail -n 40 {remote_folder(self.run.name)}/setup.log").out
            self.write("service.log", end)

    def insist(self, do: Callable, *arguments, **options):
        """What it returns. It is done again where the connection was lost, for as long as a boot may take."""
        until = None
        while True:
            try:
                return do(*arguments, **options)
            except ConnectionLost as error:
                until = until or self.clock.after(self.run.boot_timeout * MINUTE)
                if self.clock.now() > until:
                    raise
                self.trouble(error)
            self.look()
            self.pause(5)

    # ------------------------------------------------------------------------------------------- follow

    def follow(self) -> int:
        """The training's exit code. Shows what it prints, fetches its files now and then, and stops it when a person
        asks for that or the time is up.
        """
        ending, give_up, told = None, self.run.deadline, False
        pull_at, look_at = self.clock.after(self.run.pull_every * MINUTE), self.clock.after(MINUTE)
        while True:
            poll = self.poll()
            if poll and poll.is_over and self.run.log_offset >= poll.size:
                self.update(exit_code=137 if poll.exit_code is None else poll.exit_code)
                break
            if ending is None and (ending := self.reason_to_stop()):
                self.say(f"{ending}: the training is asked to save and stop")
                # half of what is left of the time is for fetching
                give_up = min(self.clock.after(3 * MINUTE), (self.clock.now() + give_up) / 2)
            if ending and poll and not told:
                told = self.tell_to_stop()
            if self.clock.now() > give_up:
                raise ending or OutOfTime("out of time")
            if not ending and self.clock.now() > pull_at:
                self.try_to_pull()
                pull_at = self.clock.after(self.run.pull_every * MINUTE)
            if self.clock.now() > look_at:
                self.look()
                look_at = self.clock.after(MINUTE)
            if not poll or self.run.log_offset >= poll.size:
                self.pause(5, patient=True)
        if ending:
            raise ending
        return self.run.exit_code

    def poll(self) -> Poll | None:
        """What is new in the log is shown and kept; None without a connection."""
        try:
            self.machine = self.machine or self.connect()
            poll = self.machine.poll(self.run.log_offset)
        except (HostKeyChanged, Cancelled):
            raise
        except (MachineError, ApiError, OSError) as error:
            self.trouble(error)
            return None
        self.troubles = 0
        if poll.log:
            self.write("train.log", poll.log)
            if self.echo:
                show(redact(poll.log.decode(errors="replace")), sys.stdout)
            self.update(log_offset=self.run.log_offset + len(poll.log))
        return poll

    def tell_to_stop(self) -> bool:
        """Whether the training knows now; it may be told twice."""
        try:
            self.machine.stop()
            return True
        except ConnectionLost as error:
            self.trouble(error)
            return False

    def trouble(self, error: Exception) -> None:
        self.troubles += 1
        if self.troubles in (1, 10, 100, 1000):
            self.say(f"{error}: trying again until {clock_time(self.run.deadline)}")

    def reason_to_stop(self) -> Ending | None:
        if self.clock.now() > self.run.stop_at:
            return OutOfTime("the time is up")
        if not self.signals.count:
            return None
        if self.echo and sys.stdin.isatty() and wants_to_detach(self.signals, self.run.deadline):
            if self.is_watched():
                raise Detached
        return Stopped("stopped by a signal")

    def look(self) -> None:
        """That the machine lives, and the watchdog does. One odd answer does not end a training."""
        self.is_watched()
        try:
            self.require_alive(self.api.instance(self.run.instance_id))
            self.misses = 0
        except ApiError as error:
            self.trouble(error)
        except MachineLost:
            self.misses += 1
            if self.misses > 1:
                raise

    def is_watched(self) -> bool:
        """Whether there is a watchdog now; it is started where there was none."""
        try:
            start_watchdog(self.ledger, self.run.name)
            return True
        except (ValueError, OSError) as error:
            self.say(str(error))
            return False

    def try_to_pull(self) -> None:
        self.interruptible = True
        try:
            self.machine.pull(Path(self.run.out_dir))
            self.say(f"fetched; {self.so_far()}")
        except Cancelled:
            self.signals.check(patient=True)
        except MachineError as error:  # it is tried again, and at the end with patience
            self.trouble(error)
        finally:
            self.interruptible = False

    def fetch(self, minutes: float = 30) -> None:
        """All that there is, with patience: afterwards the machine and its disk are gone."""
        until = min(self.clock.after(minutes * MINUTE), max(self.run.deadline, self.clock.after(MINUTE)))
        self.ssh_until = until + self.clock.second * MINUTE  # for what has begun by then
        self.update(phase="fetching")
        while True:
            try:
                self.machine = self.machine or self.connect()
                self.machine.pull(Path(self.run.out_dir))
                return self.add_what_was_uploaded()
            except (MachineError, ApiError, Ending) as error:
                problem = error
            if isinstance(problem, (Ending, HostKeyChanged)) or self.clock.now() > until or self.is_lost():
                raise NotFetched(f"not everything was fetched: {problem}")
            self.trouble(problem)
            self.pause(10, patient=True)

    def is_lost(self) -> bool:
        """Whether the machine is known to be gone, and its disk with it."""
        try:
            machine = self.api.instance(self.run.instance_id)
        except ApiError:
            return False
        return machine is None or machine.status not in ("booting", "active", "unhealthy")

    def add_what_was_uploaded(self) -> None:
        """The run's own changes.diff is empty, as there is no git on the machine."""
        source = self.ledger.path(self.run.name, "uploaded.diff")
        try:
            shutil.copy(source, self.run.out_dir)
        except OSError as error:
            self.say(f"{source} could not be copied: {error.strerror}")

    # ------------------------------------------------------------------------------------- the end of it

    def live(
        self,
        offers: Callable[[], Iterable[Offer]],
        wait_minutes: float,
        files: list[str],
        secrets: dict[str, str],
        detach: bool = False,
    ) -> int:
        """From nothing to the exit code of the training, with the machine gone or kept as asked."""

        def work() -> int:
            try:
                start_watchdog(self.ledger, self.run.name)
            except ValueError as error:
                raise NothingLaunched(f"nothing is launched: {error}") from None
            self.launch(offers, wait_minutes)
            self.prepare(files, secrets)
            if detach and self.is_watched():
                raise Detached
            return self.follow()

        return self.conclude(work)

    def take_over(self) -> int:
        """Goes on where the process that looked after it was cut off."""

        def work() -> int:
            if self.run.kept_until:
                raise OutOfTime("kept as long as was asked for")
            if self.run.phase in ("training", "fetching"):
                self.forget_unknown_output()
                return self.follow()
            raise MachineLost(f"cut off while {self.run.phase}")

        return self.conclude(work)

    def forget_unknown_output(self) -> None:
        """What a process that was cut off had written to train.log, and not to the ledger: it comes again."""
        path = self.ledger.path(self.run.name, "train.log")
        if path.exists() and path.stat().st_size > self.run.log_offset:
            os.truncate(path, self.run.log_offset)

    def conclude(self, work: Callable[[], int]) -> int:
        """Does the work, and whatever comes of it, ends the rental. The exit code."""
        try:
            code = work()
            return self.end(code, f"the training ended with exit code {code}")
        except Detached:
            self.update(detached=True)
            self.say(
                f"detached; the machine is terminated after the training, or {clock_time(self.run.deadline)}"
            )
            return 0
        except TerminateNow:
            return self.end(
                Stopped.code, "terminated at once, as asked: nothing more is fetched", fetch=False
            )
        except Ending as ending:
            return self.end(ending.code, str(ending))
        except Cancelled:
            ending = Stopped("stopped by a signal") if self.signals.count else OutOfTime("out of time")
            return self.end(ending.code, str(ending), fetch=self.signals.count < 2)
        except (MachineError, ApiError) as error:
            ending = MachineLost if self.run.launched else NothingLaunched
            return self.end(ending.code, str(error))
        except BaseException:  # a mistake of ours costs the person no money
            self.say_mistake()
            return self.end(MachineLost.code, "an internal error")

    def end(self, code: int, outcome: str, fetch: bool = True, keep: bool = True) -> int:
        self.say(outcome)
        if fetch and self.run.started:
            try:
                self.fetch()
            except NotFetched as problem:
                self.say(str(problem))
                code = code or problem.code
            except TerminateNow:
                self.say("not everything was fetched: terminated at once, as asked")
                code = code or Stopped.code
            except Exception:  # a mistake of ours must not keep the machine running
                self.say_mistake()
                code = code or NotFetched.code
        if keep and self.keeps(code):
            self.say(
                f"the machine is kept until {clock_time(self.run.kept_until)}, ${self.run.price:.2f} an hour"
            )
            return code
        try:
            self.terminate()
        except StillRunning as problem:
            if self.is_in_account():
                self.is_watched()
            self.say(str(problem))
            return problem.code
        launched = self.run.launched
        self.update(phase="gone", outcome=outcome, code=code, ended=self.clock.now())
        self.say(f"the machine is gone, about ${self.cost:.2f}" if launched else "nothing was launched")
        return code

    def keeps(self, code: int) -> bool:
        """Whether the machine stays for a while, as asked for; its watchdog terminates it then."""
        asked = self.run.keep and code == 0 or self.run.keep_on_failure and code not in (0, Stopped.code)
        if not (asked and self.run.instance_id) or self.run.kept_until or not self.is_watched():
            return False
        until = self.run.deadline
        if code:
            until = min(until, self.clock.after(self.run.keep_on_failure * MINUTE))
        self.update(kept_until=until)
        return until > self.clock.now()

    def terminate(self) -> None:
        """Returns when the machine is gone, or none ever was. StillRunning where that could not be seen."""
        if not self.run.launched:
            return
        if not self.is_in_account():
            raise StillRunning(self.warning(ValueError("it was launched with another key or service")))
        until = self.clock.after(15 * MINUTE if self.run.instance_id else 5 * MINUTE)
        with self.signals.none():
            self.update(phase="terminating")
            self.say("terminating")
            problem = None
            while True:
                try:
                    if self.run.instance_id:
                        self.api.terminate([self.run.instance_id], give_up=MINUTE)
                except ApiError as error:  # perhaps because it is gone
                    problem = error
                try:
                    if self.is_gone():
                        return
                except ApiError as error:
                    problem = error
                if self.clock.now() > until:
                    raise StillRunning(self.warning(problem))
                self.clock.sleep(5)

    def is_in_account(self) -> bool:
        """Whether this key and service know the machine: to others it looks as if it were gone."""
        return self.run.account in ("", self.api.account)

    def is_gone(self) -> bool:
        """Whether that can be seen. What came of an unanswered request besides is asked to end, too."""
        age = self.clock.seconds_since(self.run.launched)
        if self.run.adopted or not self.run.instance_id:
            if others := [machine.id for machine in self.ours() if machine.id != self.run.instance_id]:
                if not self.run.instance_id:
                    self.update(instance_id=others[0], adopted=True)
                self.api.terminate(others, give_up=MINUTE)
                return False
        if not self.run.instance_id:
            return age > 30 * MINUTE
        machine = self.api.instance(self.run.instance_id)
        if machine is None:
            return age > 3 * MINUTE  # not listed yet does not mean not there
        return machine.status in ("terminated", "preempted")

    def warning(self, problem: Exception | None) -> str:
        run = self.run
        which = f"{run.instance_type} {run.instance_id or 'of unknown id'} ({run.name}, {run.region})"
        why = f" ({problem})" if problem else ""
        return (
            f"A MACHINE MAY STILL BE RUNNING: {which}, ${run.price:.2f} an hour, could not be seen to be gone{why}. "
            f"Terminate it at {CONSOLE}; `python lambda_service.py terminate {run.name}` tries again"
        )


# ------------------------------------------------------------------------------------------------------------
# The watchdog


def watch(rental: Rental) -> None:
    """Returns when the machine is gone, and not before."""
    with rental.ledger.hold(rental.run.name, "watchdog.lock") as ours:
        while ours and not rental.run.is_over:
            try:
                guard(rental)
            except Exception:  # whatever it was: there may be a machine to be terminated
                rental.say_mistake()
            rental.clock.sleep(5)


def guard(rental: Rental) -> None:
    rental.ledger.path(rental.run.name).mkdir(parents=True, exist_ok=True)  # somebody may have removed it
    with rental.ledger.hold(rental.run.name) as free:
        try:
            rental.run = rental.ledger.load(rental.run.name)  # not before: the service may just have ended it
        except ValueError:  # its file is damaged or gone: what is remembered must do
            rental.say_mistake()
            rental.run = replace(rental.run, launched=rental.run.launched or rental.run.created)
        run, now = rental.run, rental.clock.now()
        if free and not run.is_over and now >= run.kept_until:
            rental.take_over()
        elif not free and run.launched and rental.clock.seconds_since(run.deadline) > 3 * MINUTE:
            rental.end(OutOfTime.code, "the service has not terminated at its deadline", fetch=False)


def start_watchdog(ledger: Ledger, name: str, seconds: float = 20) -> None:
    """Leaves a watchdog running that outlives this process. ValueError where it does not come up."""
    if ledger.is_held(name, "watchdog.lock"):
        return
    command = [sys.executable, str(ROOT / "lambda_service.py"), "watch", name]
    with open(ledger.path(name, "watchdog.log"), "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
        )
    until = time.monotonic() + seconds
    while not ledger.is_held(name, "watchdog.lock"):
        if process.poll() is not None or time.monotonic() > until:
            raise ValueError(f"the watchdog does not start: see {ledger.path(name, 'watchdog.log')}")
        time.sleep(0.05)
