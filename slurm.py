"""Train on a SLURM cluster: submit a run, see how it stands, read along, cancel it.

    python data/openwebtext/prepare.py         # on the login node, as compute nodes often have no network
    python slurm.py submit config/train_gpt2.py --nodes=2 --gpus=4 --time=12:00:00 --wandb_log=true
    python slurm.py submit config/train_default.py --gpus=0 --time=30 --dry-run     # shows the job
    python slurm.py status
    python slurm.py logs out/train_gpt2-001 -f
    python slurm.py cancel out/train_gpt2-001
    python slurm.py submit --init_from=resume --out_dir=out/train_gpt2-001 --max_iters=900000 --gpus=8

Flags with underscores (`--max_iters=900000`) are train.py's. What is submitted is a copy in RUN/slurm: code/ (the
tracked files as they are now, in a shallow clone, so that the run knows its commit and what was changed since),
config/, job.sh, and later logs/. What you edit after that changes nothing.

The job runs torchrun on every node. Three minutes before its time limit, or when it is sent SIGTERM, the training
saves and the job goes back into the queue, to resume there as often as it takes. A start that gets nowhere is not
repeated, and neither is one that ends with an error; `sbatch RUN/slurm/job.sh` resumes by hand. The job is
launch/slurm_job.sh.

It needs SLURM, git and a file system that all nodes share, and no PyTorch. With WANDB_API_KEY in the environment and
--wandb_log=true, the job reads that key from a file that only its owner can read, until the run is finished; neither
it nor any variable whose name looks like a secret's goes into the script or through sbatch.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import load_with_files, run_script
from training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent
TEMPLATE = ROOT / "launch" / "slurm_job.sh"
PLACE = "# slurm.py writes the settings of the job here\n"
CHECKPOINT = re.compile(r"(last|best)-(\d{8,})(\.old)?")
SECRET = re.compile("KEY|TOKEN|SECRET|PASS", re.IGNORECASE)
SHORTEST = 10  # minutes a job may be given, as the last three are for saving
OVER = "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL OUT_OF_MEMORY PREEMPTED BOOT_FAIL DEADLINE ENDED".split()


def call(*command: str | Path, **options) -> str:
    """What a program prints. ValueError where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except FileNotFoundError:
        where = "install it" if command[0] == "git" else "run this on a login node of the cluster"
        raise ValueError(f"there is no {command[0]} here: {where}") from None
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------------
# The run folder


def newest_step(run: Path) -> int | None:
    """The step of its newest checkpoint, None where it has none."""
    steps = [int(match[2]) for path in run.glob("*-*") if (match := CHECKPOINT.fullmatch(path.name))]
    return max(steps, default=None)


def next_run(config_files: list[str]) -> Path:
    """out/<config name>-NNN, as train.py would name it."""
    stem = Path(config_files[-1]).stem if config_files else "train"
    taken = [re.fullmatch(re.escape(stem) + r"-(\d{3,})", path.name) for path in Path("out").glob("*-*")]
    return Path("out") / f"{stem}-{max([int(match[1]) for match in taken if match], default=0) + 1:03d}"


def saved_settings(run: Path) -> dict:
    """What the run's newest checkpoint was trained with."""
    step = newest_step(run)
    states = sorted(run.glob(f"*-{step:08d}*/state.json")) if step is not None else []
    if not states:
        raise ValueError(f"no checkpoint in {run}: leave out --init_from=resume to begin a run there")
    return json.loads(states[-1].read_text())["train_config"]


def require_no_run(run: Path) -> None:
    begun = (run / "config.json").exists() or (run / "metrics.jsonl").exists()
    if begun or newest_step(run) is not None:
        raise ValueError(
            f"{run} already holds a run and is left as it is: continue it with --init_from=resume, "
            f"or name another --out_dir"
        )


# ------------------------------------------------------------------------------------------------------------
# What to train


@dataclass(frozen=True)
class Training:
    run: Path
    config: TrainConfig
    config_files: list[str]
    flags: list[str]  # for train.py

    @property
    def data(self) -> Path:
        return Path(self.config.data_dir, self.config.dataset).absolute()

    @property
    def prepare(self) -> list[str]:
        """The command that makes the data; that of one's own text has blanks to fill in."""
        script = ROOT / "data" / self.config.dataset / "prepare.py"
        if script.exists():
            return [sys.executable, str(script), f"--out_dir={self.data}"]
        script = ROOT / "data" / "custom" / "prepare.py"
        return [sys.executable, str(script), "--input=FILE", f"--name={self.config.dataset}"]


def training(arguments: list[str], nodes: int, gpus: int) -> Training:
    """ValueError where train.py would refuse it, as far as that can be known here."""
    config, files = load_with_files(TrainConfig, arguments, check="--init_from=resume" not in arguments)
    flags = [argument for argument in arguments if argument.startswith("-")]
    if config.init_from == "resume":
        if not config.out_dir:
            raise ValueError("--init_from=resume: name the run with --out_dir=RUN")
        run = Path(config.out_dir)
        config, _ = load_with_files(TrainConfig, flags, base=saved_settings(run))
    else:
        run = Path(config.out_dir) if config.out_dir else next_run(files)
        require_no_run(run)
    if any(flag.startswith("--device=") for flag in flags):
        raise ValueError("leave out --device: --gpus=0 trains on the CPUs, any other number on those GPUs")
    processes = nodes * max(gpus, 1)
    if config.gradient_accumulation_steps % processes:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts the micro-batches of all "
            f"{processes} processes: make it a multiple of {processes}"
        )
    flags += [f"--out_dir={run.absolute()}", "--device=cuda" if gpus else "--device=cpu"]
    return Training(run, config, files, flags)


def missing_data(asked: Training) -> str:
    """What to do about it; empty where the data is there."""
    if (asked.data / "meta.json").exists():
        return ""
    return f"no data in {asked.data}: run `{shlex.join(asked.prepare)}` first, or give --prepare"


def vocabulary_note(asked: Training) -> str:
    """GPT-2's vocabulary is downloaded at first use, into a folder that no other node sees."""
    meta = json.loads((asked.data / "meta.json").read_text(encoding="utf-8"))
    if meta["tokenizer"]["kind"] != "gpt2" or "TIKTOKEN_CACHE_DIR" in os.environ:
        return ""
    return (
        "note: where compute nodes have no network, GPT-2's vocabulary must be in a shared folder: export "
        "TIKTOKEN_CACHE_DIR=$HOME/.cache/tiktoken before preparing the data and before submitting"
    )


# ------------------------------------------------------------------------------------------------------------
# The job


@dataclass(frozen=True)
class Job:
    """What RUN/slurm/job.json says."""

    id: str
    max_iters: int

    @classmethod
    def of(cls, run: Path) -> "Job":
        path = run / "slurm" / "job.json"
        if not path.exists():
            raise ValueError(f"{run} was not submitted: `python slurm.py status` lists what was")
        return cls(**json.loads(path.read_text()))


def job_script(asked: Training, options: argparse.Namespace) -> str:
    run, job = asked.run.absolute(), asked.run.absolute() / "slurm"
    directives = {
        "job-name": run.name,
        "nodes": options.nodes,
        "gres": f"gpu:{options.gpus}" if options.gpus else "",
        "cpus-per-task": options.cpus or 4 * options.gpus or 2,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "mail-user": options.mail,
        "mail-type": "END,FAIL,REQUEUE" if options.mail else "",
        "chdir": Path.cwd(),
        "output": str(job / "logs" / "%j.log").replace(str(job), str(job).replace("%", "%%")),
    }
    settings = {
        "run": run,
        "job": job,
        "python": sys.executable,
        "processes": max(options.gpus, 1),
        "data": asked.data,
        "prepare": shlex.join(asked.prepare),
    }
    config = [str(copy) for _, copy in config_copies(asked)]
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in directives.items() if value]
    lines += [f"{name}={shlex.quote(str(value))}" for name, value in settings.items()]
    lines += [f"train=({shlex.join([str(job / 'code' / 'train.py'), *config, *asked.flags])})"]
    for line in lines:
        if not line.isprintable():
            raise ValueError(f"{line!r}: line breaks and the like cannot stand in a job")
    before, after = TEMPLATE.read_text().split(PLACE)
    return before + "\n".join(lines) + "\n" + after


def config_copies(asked: Training) -> list[tuple[str, Path]]:
    """Each config file and its copy; numbered, as two may have the same name."""
    folder = asked.run.absolute() / "slurm" / "config"
    return [(file, folder / str(number) / Path(file).name) for number, file in enumerate(asked.config_files)]


def snapshot(code: Path) -> None:
    """The tracked files as they are now, as changes to the commit they are based on."""
    if not (ROOT / ".git").exists():
        raise ValueError(
            f"{ROOT} is not a git checkout, so nobody knows what to copy: git init, add and commit"
        )
    call("git", "clone", "--quiet", "--no-local", "--depth=1", ROOT, code)
    listed = {name for tree in (ROOT, code) for name in call("git", "ls-files", "-z", cwd=tree).split("\0")}
    for name in listed - {""}:
        if (ROOT / name).is_file():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, code / name)
        else:
            (code / name).unlink(missing_ok=True)
    call("git", "add", "--all", cwd=code)  # `git diff HEAD` then tells of new files, too


def write_job(asked: Training, script: str) -> Path:
    """Everything that the job needs, in RUN/slurm. Logs of earlier jobs of this run stay."""
    job = asked.run / "slurm"
    for folder in ("code", "config"):
        shutil.rmtree(job / folder, ignore_errors=True)
    (job / "logs").mkdir(parents=True, exist_ok=True)
    snapshot(job / "code")
    for file, copy in config_copies(asked):
        copy.parent.mkdir(parents=True)
        shutil.copy2(file, copy)
    (job / "wandb_key").unlink(missing_ok=True)
    if asked.config.wandb_log and (key := os.environ.get("WANDB_API_KEY")):
        with open(os.open(job / "wandb_key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
    (job / "job.sh").write_text(script)
    return job / "job.sh"


def submit(options: argparse.Namespace) -> None:
    asked = training(options.training, options.nodes, options.gpus)
    script = job_script(asked, options)
    missing = missing_data(asked)
    if options.dry_run:
        print(f"{script}# a dry run: this is not written to {asked.run}/slurm/job.sh, and not submitted")
        print(f"# {missing}" if missing else "# the data is there")
        return
    if (asked.run / "slurm" / "job.json").exists() and not is_over(look(asked.run, queue())):
        raise ValueError(f"job {Job.of(asked.run).id} of {asked.run} is not over: `cancel` it first")
    if missing and not options.prepare:
        raise ValueError(missing)
    if missing and subprocess.run(asked.prepare).returncode:
        raise ValueError(f"{asked.data} was not prepared, so nothing was submitted")
    if note := vocabulary_note(asked):
        print(note)
    asked.run.mkdir(parents=True, exist_ok=bool(asked.config.out_dir))  # a new name may just have been taken
    try:
        path = write_job(asked, script)
        environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
        number = call("sbatch", "--parsable", path, env=environment).strip().partition(";")[0]
    except (ValueError, OSError):
        if not (asked.run / "slurm" / "job.json").exists():
            shutil.rmtree(asked.run / "slurm", ignore_errors=True)
            if not any(asked.run.iterdir()):
                asked.run.rmdir()
        raise
    job = Job(number, asked.config.max_iters)
    (asked.run / "slurm" / "job.json").write_text(json.dumps(asdict(job)) + "\n")
    print(f"job {job.id}, run folder {asked.run}. Try next:")
    for command in ("status", f"logs {asked.run} -f", f"cancel {asked.run}"):
        print(f"  python slurm.py {command}")


# ------------------------------------------------------------------------------------------------------------
# How it stands


def queue() -> dict[str, list[str]]:
    """State, time, limit and place of every job that the controller knows of mine, by its number."""
    lines = call("squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%M|%l|%R").splitlines()
    return {number: rest for number, *rest in (line.strip().split("|", 4) for line in lines)}


def look(run: Path, queue: dict[str, list[str]]) -> dict[str, str | int | None]:
    """How a run's job stands, from whoever still knows."""
    job = Job.of(run)
    state, time_used, limit, where = queue.get(job.id) or [remembered(run, job), "", "", ""]
    row = dict(run=str(run), job=job.id, state=state, time=time_used, limit=limit, where=where)
    return row | dict(step=newest_step(run), max_iters=job.max_iters)


def remembered(run: Path, job: Job) -> str:
    """The state of a job that the controller has forgotten, which takes minutes: from the accounts, if the cluster
    keeps any, or from the job's own last word.
    """
    try:
        states = call("sacct", "-n", "-X", "-P", f"--jobs={job.id}", "--format=State").split()
    except ValueError:
        states = []
    if states:
        return states[0]
    code = run / "slurm" / "exit_code"
    if not code.exists():
        return "ENDED"  # killed: the time limit, the node, scancel
    return "COMPLETED" if code.read_text().strip() == "0" else "FAILED"


def is_over(row: dict) -> bool:
    return row["state"] in OVER


def runs(named: list[str]) -> list[Path]:
    """Those named, or all that were submitted into out/, the newest last."""
    found = sorted(Path("out").glob("*/slurm/job.json"), key=lambda path: path.stat().st_mtime)
    return [Path(run) for run in named] or [path.parents[1] for path in found]


def status(options: argparse.Namespace) -> None:
    known = queue()
    rows = [look(run, known) for run in runs(options.run)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("nothing was submitted into out/")
        return
    table = [["run", "job", "state", "time", "limit", "where", "saved"]]
    for row in rows:
        saved = "-" if row["step"] is None else f"{row['step']}/{row['max_iters']}"
        table.append([str(row[name]) for name in table[0][:-1]] + [saved])
    widths = [max(map(len, column)) for column in zip(*table)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())


def logs(options: argparse.Namespace) -> None:
    """What the job printed, in all its starts."""
    found = runs([options.run] if options.run else [])
    if not found:
        raise ValueError("nothing was submitted into out/: name a run")
    run, size = found[-1], 0
    path = run / "slurm" / "logs" / f"{Job.of(run).id}.log"
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            row = look(run, queue())  # before the log is read: what is over has written all of it
            if path.exists():
                with open(path, "rb") as log:
                    log.seek(size)
                    sys.stdout.buffer.write(log.read())
                    sys.stdout.flush()
                    size = log.tell()
            else:
                print(f"nothing printed yet: {row['state']} {row['where']}", file=sys.stderr)
            if not options.follow or is_over(row):
                break
            time.sleep(options.every)


def cancel(options: argparse.Namespace) -> None:
    for run in map(Path, options.run):
        call("scancel", Job.of(run).id)
        (run / "slurm" / "wandb_key").unlink(missing_ok=True)
        print(f"{run}: job {Job.of(run).id} is told to stop; `sbatch {run}/slurm/job.sh` would resume it")


# ------------------------------------------------------------------------------------------------------------


def time_limit(text: str) -> str:
    """A time as SLURM writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, H:M:S or D-H:M:S")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part]
    if not days and len(numbers) < 3:
        numbers = [0, *numbers]  # no hours
    hours, minutes, *_ = [*numbers, 0]
    if 1440 * int(days or 0) + 60 * hours + minutes < SHORTEST:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the last 3 minutes are for saving, so give it {SHORTEST}"
        )
    return text


def at_least(least: int):
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {least}")
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, does, help: str):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(does=does)
        return sub.add_argument

    add = command(
        "submit", submit, "CONFIG ... --key=value as for train.py: copy the code, queue the training"
    )
    add("--nodes", type=at_least(1), default=1, metavar="N", help="machines [1]")
    add("--gpus", type=at_least(0), default=1, metavar="N", help="on each of them; 0 trains on the CPUs [1]")
    add("--time", type=time_limit, default="4:00:00", help="of one start; the next goes on [4:00:00]")
    add(
        "--cpus", type=at_least(0), default=0, metavar="N", help="a node; 0 is four a GPU, or two without [0]"
    )
    add("--mem", default="", metavar="SIZE", help="a node, such as 64G; the cluster's default")
    for name in ("partition", "account", "qos"):
        add(f"--{name}", default="", metavar="NAME", help="as for sbatch; the cluster's default")
    add("--mail", default="", metavar="ADDRESS", help="told of its end, failure and requeueing")
    add("--prepare", action="store_true", help="prepare the data here where it is missing")
    add("--dry-run", action="store_true", help="print the job, write and submit nothing")

    add = command("status", status, "where the jobs stand: of RUN ..., or of all in out/")
    add("run", nargs="*", metavar="RUN")
    add("--json", action="store_true")
    add = command("logs", logs, "what RUN's job printed; the newest in out/ where none is named")
    add("run", nargs="?", metavar="RUN")
    add("-f", "--follow", action="store_true", help="go on until the job is over")
    add("--every", type=float, default=5.0, metavar="SECONDS", help="to look so often [5]")
    add = command("cancel", cancel, "end the jobs of RUN ...; what they train is saved if that is quick")
    add("run", nargs="+", metavar="RUN")
    return top


def main() -> None:
    options, options.training = parser().parse_known_args()
    if options.training and options.does is not submit:
        raise ValueError(f"unknown argument {options.training[0]}: see --help")
    options.does(options)


if __name__ == "__main__":
    run_script(main)
