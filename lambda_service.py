"""Train on a GPU rented from Lambda Cloud, and leave no machine running by accident.

    export LAMBDA_API_KEY=...  LAMBDA_SSH_KEY=...            # the name of a key registered with Lambda
    python lambda_service.py doctor config/train_default.py  # checks everything, spends nothing
    python lambda_service.py types                           # prices, memory, where there is capacity
    python lambda_service.py train config/train_default.py --instance gpu_1x_a10 --region us-east-1
    python lambda_service.py train config/train_daggpt_lambda.py --max-price 2 --max-hours 6 --max_iters=5000
    python lambda_service.py list | logs | attach | ssh | pull | terminate | gc

`train` launches a machine, uploads the tracked files, runs the same train.py there, shows its output, fetches its
files every few minutes and at the end, terminates the machine and sees that it is gone. What `train --help` does not
list (`--max_iters=5000`) is train.py's. Ctrl-C once: the training saves and stops, its
files are fetched, the machine is terminated; twice: it is terminated now. launch/lambda_run.py is the life of a machine,
launch/run_store.py what is known about it, launch/remote.py how it is talked to, launch/lambda_api.py the service's API.

The exit code is the training's, or one of

    90  a machine may still be running: the last lines name it     93  the time was up
    91  nothing was launched: no capacity, or refused              94  not everything could be fetched
    92  the machine failed, and is gone                            130 stopped by you

It needs requests, git, OpenSSH and rsync, and no PyTorch. Where wandb_log is on, the machine gets WANDB_API_KEY (over
ssh, into a file only its user can read); LAMBDA_API_KEY never leaves this computer.
"""

import argparse
import atexit
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from configurator import run_script
from launch.exit_codes import NothingLaunched
from launch.lambda_api import KEYS, Api, Instance, InstanceType, launch_body, redact
from launch.lambda_run import TAG, Offer, Rental, remote_folder, start_watchdog, watch
from launch.remote import Done, Machine
from launch.run_store import Ledger, Run, state_folder
from launch.signals import Signals, clock_time, drop_unprinted, show
from launch.upload import left_behind, training, uploaded

ROOT = Path(__file__).parent


def say(line: str = "") -> None:
    show(f"{redact(line)}\n", sys.stdout)


def remark(line: str) -> None:
    """Beside what was asked for: a script reads stdout."""
    show(f"{redact(line)}\n", sys.stderr)


def service() -> Api:
    """All processes of one person keep to the service's rates together."""
    return Api.from_environment(remark, pace=state_folder())


def ask(question: str, yes: bool, by_script: bool = False) -> bool:
    """A person at a terminal is asked. Without one, `by_script` says whether the command is enough."""
    if yes:
        return True
    if not sys.stdin.isatty():
        if not by_script:
            raise ValueError("nobody is at a terminal to be asked: say --yes")
        return True
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


# ------------------------------------------------------------------------------------------------------------
# What to rent


def offers(api: Api, options: argparse.Namespace, micro_batches: int) -> list[Offer]:
    """What there is capacity for now and fits, in the order of preference: as named, or the cheapest first."""
    types = api.instance_types()
    names = {kind.name: kind for kind in types}
    if options.instance == "auto":
        wanted = [kind for kind in types if fits(kind, options) and micro_batches % max(kind.gpus, 1) == 0]
    else:
        asked = options.instance.split(",")
        if unknown := [name for name in asked if name not in names]:
            raise ValueError(f"no instance type {unknown[0]!r}: `types` lists {', '.join(sorted(names))}")
        wanted = [names[name] for name in asked]
        if uneven := [kind for kind in wanted if micro_batches % max(kind.gpus, 1)]:
            raise ValueError(
                f"{uneven[0].name} has {uneven[0].gpus} GPUs: make --gradient_accumulation_steps a multiple of that"
            )
    if not wanted:
        raise ValueError(
            "no type has that price, number of GPUs and memory: `types` lists them; see --max-price, "
            "--min-gpus, --min-gpu-memory"
        )
    regions = possible_regions(api, options)
    if regions is None:
        return [(kind, region) for kind in wanted for region in kind.regions]
    return [(kind, region) for kind in wanted for region in regions if region in kind.regions]


def possible_regions(api: Api, options: argparse.Namespace) -> list[str] | None:
    """In the order of preference; None is any. A file system can be reached from its own region alone."""
    asked = None if options.region == "any" else options.region.split(",")
    if asked:
        known = sorted({image.region for image in api.images()})
        if unknown := [region for region in asked if region not in known]:
            raise ValueError(f"no region {unknown[0]!r}; there are {', '.join(known)}")
    for name in options.filesystem:
        of_system = [system.region for system in api.file_systems() if system.name == name]
        if not of_system:
            raise ValueError(f"no file system {name!r} in this account")
        asked = [region for region in asked or of_system if region in of_system]
        if not asked:
            raise ValueError(f"file system {name} is in {of_system[0]}: --region={of_system[0]}")
    return asked


def fits(kind: InstanceType, options: argparse.Namespace) -> bool:
    memory = kind.gpu_memory_gb or 0
    return (
        kind.gpus >= max(options.min_gpus, 1)
        and memory >= options.min_gpu_memory
        and kind.price_cents_per_hour <= 100 * options.max_price
        and "gh200" not in kind.name  # an ARM processor: only where it is asked for by name
    )


def identity(api: Api, given: str | None) -> tuple[str, str]:
    """(name of the registered key, file of its private half or "" where the agent has it). Before money is spent."""
    name = os.environ.get("LAMBDA_SSH_KEY", "")
    keys = {key.name: key.public_key for key in api.ssh_keys()}
    if not name:
        raise ValueError(f"LAMBDA_SSH_KEY is not set; registered keys: {', '.join(keys) or 'none'}")
    if name not in keys:
        raise ValueError(
            f"LAMBDA_SSH_KEY={name!r} is not the name of a registered key; there are: {', '.join(keys) or 'none'}"
        )
    blob = keys[name].split()[1:2]
    if in_agent(blob) and not given:
        return name, ""
    if given := given or os.environ.get("LAMBDA_SSH_IDENTITY"):
        candidates = [Path(given).expanduser().resolve()]
    else:
        public = sorted((Path.home() / ".ssh").glob("*.pub"))
        candidates = [path.with_suffix("") for path in public if blob == path.read_text().split()[1:2]]
    for path in candidates:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; --identity names the private key")
        half = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", path], capture_output=True, text=True)
        if half.returncode and not in_agent(blob):
            raise ValueError(f"{path} cannot be used ({half.stderr.strip()}): is it locked? ssh-add {path}")
        if half.returncode == 0 and half.stdout.split()[1:2] != blob:
            raise ValueError(f"{path} is not the private half of {name}")
        return name, str(path)
    raise ValueError(f"the private half of {name} is not in ~/.ssh and not in the agent: --identity=FILE")


def in_agent(blob: list[str]) -> bool:
    agent = subprocess.run(["ssh-add", "-L"], capture_output=True, text=True)
    return bool(blob) and blob[0] in agent.stdout.split()


# ------------------------------------------------------------------------------------------------------------
# Commands


def types(options: argparse.Namespace) -> int:
    found = service().instance_types()
    if options.json:
        say(json.dumps([asdict(kind) for kind in found], indent=2))
        return 0
    rows = [["type", "GPUs", "memory", "$ an hour", "has capacity in"]]
    for kind in found:
        memory = f"{kind.gpu_memory_gb} GB" if kind.gpu_memory_gb else "-"
        price, regions = f"{kind.price_cents_per_hour / 100:.2f}", " ".join(kind.regions) or "-"
        rows.append([kind.name, str(kind.gpus), memory, price, regions])
    table(rows)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Every check a line; none of them spends anything."""
    results = []

    def check(what: str, of) -> None:
        try:
            results.append((what, True, str(of())))
        except (ValueError, OSError) as error:
            results.append((what, False, redact(str(error))))

    def program(name: str, *arguments: str) -> str:
        if not shutil.which(name):
            raise ValueError(
                f"not installed: Debian and Ubuntu, apt install {name.replace('ssh', 'openssh-client')}"
            )
        done = subprocess.run([name, *arguments], capture_output=True, text=True)
        return (done.stdout or done.stderr).splitlines()[0]

    def capacity() -> str:
        config = training([options.config, *options.training])[0]
        found = offers(service(), options, config.gradient_accumulation_steps)
        return (
            ", ".join(f"{kind.name} in {region}" for kind, region in found[:4]) or "none now: --wait-capacity"
        )

    check("python", lambda: sys.version.split()[0])
    check("ssh", lambda: program("ssh", "-V"))
    check("rsync", lambda: program("rsync", "--version"))
    check("git", lambda: program("git", "--version"))
    check("LAMBDA_API_KEY", lambda: f"accepted; {len(service().instances())} machines listed")
    check("LAMBDA_SSH_KEY", lambda: " ".join(identity(service(), options.identity)))
    check(
        "WANDB_API_KEY",
        lambda: "set" if os.environ.get("WANDB_API_KEY") else "not set: metrics.jsonl has it all",
    )
    check("capacity", capacity)
    check("ledger", lambda: Ledger().folder)
    check("training", lambda: f"{len(training([options.config, *options.training])[1])} files to upload")
    check("disk", lambda: f"{shutil.disk_usage(ROOT).free / 1e9:.0f} GB free for what is fetched")
    if options.json:
        say(json.dumps([dict(check=what, ok=ok, says=text) for what, ok, text in results], indent=2))
    else:
        table([["ok" if ok else "FAILED", what, text] for what, ok, text in results])
    return 0 if all(ok for _, ok, _ in results) else 1


def train(options: argparse.Namespace) -> int:
    api, ledger = service(), Ledger()
    config, files, arguments = training([options.config, *options.training])
    key, private = identity(api, options.identity)

    def available() -> list[Offer]:
        return offers(api, options, config.gradient_accumulation_steps)

    first = next(iter(available()), None)
    if first is None and not options.wait_capacity and not options.dry_run:
        say("no capacity for that now: name more types or regions, or --wait-capacity=MINUTES")
        return NothingLaunched.code
    name = f"dag-{Path(options.config).stem.removeprefix('train_').replace('_', '-')[:40]}-{secrets.token_hex(3)}"
    if config.wandb_log and not config.wandb_run_name:
        arguments.append(f"--wandb_run_name={name}")  # the run's folder there is called out
    run = Run(
        name=name,
        arguments=arguments,
        device=config.device,
        account=api.account,
        out_dir=str(ROOT.resolve() / "out" / name),
        ssh_key=key,
        identity=private,
        created=time.time(),
        max_hours=options.max_hours,
        max_cost=options.max_cost,
        boot_timeout=options.boot_timeout,
        pull_every=options.pull_every,
        keep_on_failure=options.keep_on_failure,
        keep=options.keep,
        file_systems=options.filesystem,
        image_family=options.image_family,
    )
    announce(run, files, first)
    wandb_key = os.environ.get("WANDB_API_KEY") if config.wandb_log else None
    keys = {"WANDB_API_KEY": wandb_key} if wandb_key else {}
    if options.dry_run:
        return rehearse(run, files, keys, first)
    if not ask("Launch it?", options.yes, by_script=True):
        return 130
    ledger.new(run)
    ledger.path(name, "uploaded.diff").write_text(uploaded(files), encoding="utf-8")
    Path(run.out_dir).mkdir(parents=True)
    rental = Rental(api, ledger, run, Signals().install())
    with ledger.hold(name) as ours:
        assert ours, f"somebody holds {name}"
        code = rental.live(available, options.wait_capacity, files, keys, options.detach)
    farewell(rental, code)
    return code


class Rehearsal(Machine):
    """Says what would be run; ssh's options, the same every time, only once."""

    def _run(self, argv: list[str], stdin: bytes = b"", timeout: float | None = None) -> Done:
        options = self.ssh_argv()[1:-1]
        words = [word for word in argv if word not in options]
        words = ["--rsh=ssh" if word.startswith("--rsh=") else word for word in words]
        say(shlex.join(words) + (f"  < {len(stdin)} bytes" if stdin else ""))
        return Done(0, b"out\n", "")


def rehearse(run: Run, files: list[str], keys: dict[str, str], offer: Offer | None) -> int:
    """What `train` would ask the service and the machine, one after the other."""
    kind, region = offer or (None, "REGION")
    body = launch_body(
        name=run.name,
        region=region,
        instance_type=kind.name if kind else "TYPE",
        ssh_key=run.ssh_key,
        tags={TAG: run.name},
        image_family=run.image_family or "the newest lambda-stack of the region",
        file_systems=run.file_systems,
    )
    say("GET /instances, GET /images")
    say(f"POST /instance-operations/launch {json.dumps(body)}")
    say("GET /instances/ID until it is active")
    known_hosts = Ledger().path(run.name, "known_hosts")
    identity = Path(run.identity) if run.identity else None
    machine = Rehearsal("ADDRESS", known_hosts, remote_folder(run.name), identity)
    say(f"ssh is short for {shlex.join(machine.ssh_argv()[:-1])}")
    machine.wait_reachable(time.time())
    machine.upload(ROOT, files)
    for name, value in keys.items():
        machine.secret(name, value)
    machine.setup(device=run.device)
    machine.start(run.arguments, kind.gpus if kind else 1)
    say("then the log every 5 s (`poll`), and every few minutes and at the end:")
    machine.pull(Path(run.out_dir))
    Path(run.out_dir).rmdir()
    say('POST /instance-operations/terminate {"instance_ids": ["ID"]}, GET /instances/ID until it is gone')
    return 0


def announce(run: Run, files: list[str], first: Offer | None) -> None:
    size = sum((ROOT / file).stat().st_size for file in files)
    say(f"{run.name}: python train.py {' '.join(run.arguments)}")
    if first:
        kind, region = first
        price = kind.price_cents_per_hour / 100
        hours = min(run.max_hours, run.max_cost / price) if run.max_cost else run.max_hours
        say(f"{kind.name} in {region}, {kind.gpu_description}: ${price:.2f} an hour")
        say(
            f"at most {hours:g} hours, ${hours * price:.2f}; terminated then, as long as this computer is awake and online"
        )
    say(f"{len(files)} files, {size / 1e6:.1f} MB, are uploaded; results come to {run.out_dir}")
    if others := left_behind():
        say(f"not uploaded, as git does not know them: {', '.join(others[:5])}{', ...' * (len(others) > 5)}")


def farewell(rental: Rental, code: int) -> None:
    run = rental.run
    results = Path(run.out_dir)
    if not results.is_dir() or not any(results.iterdir()):
        shutil.rmtree(results, ignore_errors=True)
        say(f"log: {rental.ledger.path(run.name, 'service.log')}; exit code {code}")
        return
    say(f"results in {results}, log in {rental.ledger.path(run.name, 'train.log')}; exit code {code}")
    if any(results.glob("*-*/model.safetensors")):
        which = " --checkpoint=last" if code else ""  # the best is only as new as the last evaluation
        say(f"  python sample.py --out_dir={os.path.relpath(results)}{which}")


def list_machines(options: argparse.Namespace) -> int:
    """Machines of the account, and runs that are not over."""
    api, ledger = service(), Ledger()
    machines = [machine for machine in api.instances() if machine.status != "terminated"]
    runs = [run for run in ledger.runs() if not run.is_over]
    for name in ledger.damaged():
        remark(f"damaged: {ledger.path(name)}; its machine, if any, is named {name}")
    rows = []
    for machine in machines:
        run = next((run for run in runs if machine.id == run.instance_id or machine.name == run.name), None)
        rows.append(describe(ledger, machine, run))
    listed = {row["name"] for row in rows}
    rows += [describe(ledger, None, run) for run in runs if run.name not in listed]
    if options.json:
        say(json.dumps(rows, indent=2))
    elif not rows:
        say("no machine is running")
    else:
        table(
            [
                list(rows[0]),
                *(
                    [f"{value:.2f}" if isinstance(value, float) else value for value in row.values()]
                    for row in rows
                ),
            ]
        )
    return 0


def keeper(ledger: Ledger, machine: Instance | None, run: Run | None) -> str:
    if run is None:
        return "another computer" if TAG in machine.tags else "somebody else"
    service, watchdog = ledger.is_held(run.name), ledger.is_held(run.name, "watchdog.lock")
    if watchdog:
        return "service and watchdog" if service and not run.detached else "watchdog"
    return "service" if service else "NOBODY: attach, or gc"


def describe(ledger: Ledger, machine: Instance | None, run: Run | None) -> dict[str, str | float]:
    until = (run.kept_until or run.deadline) if run else 0
    hours = (time.time() - run.launched) / 3600 if run and run.launched else 0.0
    price = machine.price_cents_per_hour / 100 if machine else run.price
    return {
        "name": machine.name if machine else run.name,
        "id": machine.id if machine else run.instance_id or "-",
        "type": machine.type_name if machine else run.instance_type or "-",
        "region": machine.region if machine else run.region or "-",
        "status": machine.status if machine else "not listed",
        "dollars_an_hour": price,
        "so_far": hours * price,
        "phase": run.phase if run else "-",
        "keeper": keeper(ledger, machine, run),
        "until": clock_time(until) if until else "-",
    }


def chosen(ledger: Ledger, name: str | None) -> Run:
    if name:
        return ledger.load(name)
    runs = [run for run in ledger.runs() if run.arguments]
    if not runs:
        raise ValueError(f"no run in {ledger.folder}: `train` makes one")
    return next((run for run in runs if not run.is_over), runs[0])


def logs(options: argparse.Namespace) -> int:
    ledger = Ledger()
    path = ledger.path(chosen(ledger, options.name).name, "service.log" if options.service else "train.log")
    if path.is_file():
        show(redact(path.read_text(errors="replace")), sys.stdout)
    return 0


def attach(options: argparse.Namespace) -> int:
    """Watches a run that somebody looks after, or looks after it."""
    ledger = Ledger()
    run = chosen(ledger, options.name)
    if run.is_over:
        raise ValueError(f"{run.name} is over: {run.outcome}; its results are in {run.out_dir}")
    with ledger.hold(run.name) as ours:
        if ours and not ledger.is_held(run.name, "watchdog.lock"):
            start_watchdog(ledger, run.name)
            run = ledger.load(run.name)
            if run.kept_until < time.time():  # a machine that is kept has nothing to do, and is to stay
                rental = Rental(service(), ledger, run, Signals().install())
                code = rental.take_over()
                farewell(rental, code)
                return code
    say(
        f"{run.name} is looked after; Ctrl-C leaves it so. To end it: python lambda_service.py terminate {run.name}"
    )
    try:
        for text in new_text([ledger.path(run.name, name) for name in ("service.log", "train.log")]):
            show(redact(text), sys.stdout)
            run = ledger.load(run.name)
            if run.is_over:
                return run.code
    except KeyboardInterrupt:
        return 0


def new_text(paths: list[Path]) -> Iterator[str]:
    """What is added to the files, and a little of what is there; empty once a second."""
    ends = {path: max(path.stat().st_size - 2000, 0) if path.exists() else 0 for path in paths}
    while True:
        for path in paths:
            if path.exists() and path.stat().st_size > ends[path]:
                with open(path, "rb") as file:
                    file.seek(ends[path])
                    text = file.read()
                ends[path] += len(text)
                yield text.decode(errors="replace")
        yield ""
        time.sleep(1)


def on_machine(options: argparse.Namespace) -> tuple[Rental, Run]:
    ledger = Ledger()
    run = chosen(ledger, options.name)
    if run.is_over or not run.instance_id:
        raise ValueError(f"{run.name} has no machine: {run.outcome or 'it was never launched'}")
    rental = Rental(service(), ledger, run, Signals())
    rental.machine = rental.connect()
    return rental, run


def ssh(options: argparse.Namespace) -> int:
    rental, _ = on_machine(options)
    own = {name: value for name, value in os.environ.items() if name not in KEYS}
    return subprocess.call([*rental.machine.ssh_argv(terminal=True), *options.command], env=own)


def pull(options: argparse.Namespace) -> int:
    rental, run = on_machine(options)
    rental.machine.pull(Path(run.out_dir))
    say(f"fetched to {run.out_dir}")
    return 0


def terminate(options: argparse.Namespace) -> int:
    """By name or id; what was not fetched is lost."""
    api, ledger = service(), Ledger()
    own_key, left = os.environ.get("LAMBDA_SSH_KEY"), []
    machines = [machine for machine in api.instances() if machine.status not in ("terminated", "terminating")]
    if options.all_mine:
        if own_key not in [key.name for key in api.ssh_keys()]:
            raise ValueError(
                "--all-mine: LAMBDA_SSH_KEY says which machines are yours; `list` lists all, `terminate ID`"
            )
        found = [m for m in machines if TAG in m.tags and own_key in m.ssh_key_names]
        left = [m for m in machines if TAG in m.tags and m not in found]
        named = {machine.name for machine in found}
        runs = [run for run in ledger.runs() if run.launched and not run.is_over and run.name not in named]
    else:
        found = [machine for machine in machines if {machine.name, machine.id} & set(options.names)]
        runs = [
            ledger.load(name)
            for name in options.names
            if name not in {x for m in found for x in (m.name, m.id)}
        ]
    for machine in left:
        say(f"left alone, as it has another key: {machine.name} {machine.id}")
    if not found and not runs:
        if not options.all_mine:
            raise ValueError("name a machine, or --all-mine; `list` lists them")
        say("nothing to terminate")
        return 0
    if over := [run for run in runs if run.is_over]:
        raise ValueError(f"{over[0].name} is over: {over[0].outcome}")
    if waiting := [run for run in runs if not run.launched and ledger.is_held(run.name)]:
        raise ValueError(f"{waiting[0].name} is still looking for a machine: stop that program with Ctrl-C")
    for machine in found:
        say(f"{machine.name} {machine.id}, {machine.type_name} in {machine.region}")
    if not ask("Terminate? What was not fetched is lost.", options.yes):
        return 130
    codes = [end_run(api, ledger, ledger_run(api, ledger, machine)) for machine in found]
    return max(codes + [end_run(api, ledger, run) for run in runs])


def ledger_run(api: Api, ledger: Ledger, machine: Instance) -> Run:
    """Its run; a machine from elsewhere gets one here, so that its end is written down, too."""
    for run in ledger.runs():
        if run.name == machine.name or run.instance_id == machine.id:
            return run
    price = machine.price_cents_per_hour / 100
    return ledger.new(Run.of_stranger(f"elsewhere-{machine.id}", machine.id, price, api.account))


def end_run(api: Api, ledger: Ledger, run: Run) -> int:
    return Rental(api, ledger, run, Signals()).end(0, "terminated as asked", fetch=False, keep=False)


def gc(options: argparse.Namespace) -> int:
    """Machines of this ledger that no process looks after any more, after a crash or a reboot."""
    api, ledger = service(), Ledger()
    left = []
    for run in ledger.runs():
        if not run.is_over and not ledger.is_held(run.name) and not ledger.is_held(run.name, "watchdog.lock"):
            left.append(run)
            say(f"{run.name}: {run.phase}, nobody looks after it")
    for name in ledger.damaged():
        say(
            f"{name}: its record in {ledger.path(name)} cannot be read; `list` shows whether there is a machine"
        )
    known, elsewhere = {run.name for run in ledger.runs()}, False
    for machine in api.instances():
        if (
            TAG in machine.tags
            and machine.name not in known
            and machine.status not in ("terminated", "terminating")
        ):
            elsewhere = True
            say(
                f"{machine.name} {machine.id}: launched elsewhere; `terminate {machine.id}` if it is a leftover"
            )
    if not left:
        say("nothing else is left over" if elsewhere or ledger.damaged() else "nothing is left over")
        return 1 if elsewhere or ledger.damaged() else 0
    if not ask("Terminate them? `attach NAME` would go on with one.", options.yes):
        return 130
    codes = []
    for run in left:
        with ledger.hold(run.name) as free:  # somebody may have attached meanwhile
            codes += [end_run(api, ledger, ledger.load(run.name))] if free else []
    return max(codes, default=0)


def remind(ledger: Ledger) -> None:
    """Of machines that should be gone, whatever this command is about."""
    for run in ledger.runs():
        late = time.time() > (run.kept_until or run.deadline) + 300
        kept = ledger.is_held(run.name) or ledger.is_held(run.name, "watchdog.lock")
        if run.launched and not run.is_over and (late or not kept):
            remark(f"note: {run.name} may be running, and should not: see `list`, `attach`, `gc`")


def watchdog(options: argparse.Namespace) -> int:
    ledger = Ledger()
    watch(Rental(service(), ledger, ledger.load(options.name), Signals().install(), echo=False))
    return 0


# ------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, does, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(does=does, training=[])
        return sub

    def choice(sub: argparse.ArgumentParser) -> None:
        add = sub.add_argument
        add("config", help="a config file of train.py")
        add(
            "--instance",
            default="auto",
            metavar="NAMES",
            help="types in order of preference, or auto: the cheapest",
        )
        add("--region", default="any", metavar="NAMES", help="regions in order of preference, or any")
        add("--max-price", type=positive, default=4.0, metavar="$", help="an hour, for auto [4]")
        add("--filesystem", action="append", default=[], metavar="NAME", help="attached at /lambda/nfs/NAME")
        add("--min-gpus", type=int, default=1, metavar="N", help="for auto [1]")
        add("--min-gpu-memory", type=positive, default=0.0, metavar="GB", help="of each GPU, for auto")
        add(
            "--identity",
            metavar="FILE",
            help="private key [LAMBDA_SSH_IDENTITY, or what fits in ~/.ssh or the agent]",
        )

    listing = command("types", types, "what can be rented, cheapest first")
    listing.add_argument("--json", action="store_true")

    check = command("doctor", doctor, "check everything that `train` needs, without spending anything")
    choice(check)
    check.add_argument("--json", action="store_true")

    run = command("train", train, "rent, train, fetch, terminate; any other --key=value is train.py's")
    choice(run)
    add = run.add_argument
    add(
        "--wait-capacity",
        type=positive,
        default=0.0,
        metavar="MIN",
        help="look for so long for a free machine",
    )
    add(
        "--max-hours",
        type=positive,
        default=3.0,
        metavar="H",
        help="terminate then, while this computer is awake and online [3]",
    )
    add("--max-cost", type=positive, default=0.0, metavar="$", help="the same, by the money spent")
    add("--boot-timeout", type=positive, default=30.0, metavar="MIN", help="until it can be reached [30]")
    add("--image-family", default="", metavar="NAME", help="default: the newest lambda-stack of the region")
    add("--pull-every", type=positive, default=5.0, metavar="MIN", help="fetch the run's files so often [5]")
    add("--keep", action="store_true", help="leave the machine running after the training, until --max-hours")
    add(
        "--keep-on-failure",
        type=positive,
        default=0.0,
        metavar="MIN",
        help="leave it so long after a failure",
    )
    add("--detach", action="store_true", help="come back once training has begun; the watchdog does the rest")
    add("--yes", action="store_true", help="do not ask")
    add("--dry-run", action="store_true", help="print every request and remote command, and spend nothing")

    machines = command("list", list_machines, "machines of the account, and who looks after them")
    machines.add_argument("--json", action="store_true")
    for name, does, help in (
        ("logs", logs, "what the training printed"),
        ("attach", attach, "follow a run again, and look after it where nobody does"),
        ("ssh", ssh, "a shell on the machine"),
        ("pull", pull, "fetch the run's files now"),
    ):
        sub = command(name, does, f"{help}; the newest run, or NAME")
        sub.add_argument("name", nargs="?", metavar="NAME")
        if name == "logs":
            sub.add_argument("--service", action="store_true", help="what this program did instead")
        if name == "ssh":
            sub.add_argument("command", nargs=argparse.REMAINDER, help="run this there instead of a shell")
    end = command("terminate", terminate, "terminate machines and see that they are gone")
    end.add_argument("names", nargs="*", metavar="NAME_OR_ID")
    end.add_argument(
        "--all-mine", action="store_true", help="all that were launched with LAMBDA_SSH_KEY by this tool"
    )
    end.add_argument("--yes", action="store_true", help="do not ask")
    leftovers = command("gc", gc, "terminate what no process looks after any more")
    leftovers.add_argument("--yes", action="store_true", help="do not ask")
    keeper = command("watch", watchdog, "what `train` leaves in the background")
    keeper.add_argument("name")
    return top


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def main() -> None:
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a letter that the terminal does not know ends no training
    atexit.register(drop_unprinted)
    options, rest = parser().parse_known_args()
    if rest and options.does not in (train, doctor):
        raise ValueError(f"unknown argument {rest[0]}: see --help")
    options.training = rest
    if options.does in (types, doctor, train, logs, ssh, pull):
        remind(Ledger())
    try:
        sys.exit(options.does(options))
    except KeyboardInterrupt:  # there are no Signals, so this program has launched nothing
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
