"""What goes to a rented machine: the files that git tracks, as they are now, and a training that can be run there.

    config, files, arguments = training(["config/train_default.py", "--max_iters=100"])     # ValueError: before money

Keys do not go, nor data, nor runs. What goes is noted in `uploaded`, as there is no git on the machine.
"""

import os
import subprocess
from pathlib import Path

from configurator import parse
from launch.lambda_api import KEYS, redact
from training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = (".pem", ".key", ".p12", ".netrc", "credentials.json")  # endings that are never uploaded
PRIVATE_NAMES = (".env", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519")  # beginnings, but for id_rsa.pub


def is_private(file: str) -> bool:
    name = Path(file).name
    return name.endswith(PRIVATE) or name.startswith(PRIVATE_NAMES) and not name.endswith(".pub")


def git(*words: str) -> str:
    """What it says; ValueError where this is no checkout."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise ValueError(
            f"{ROOT} is not a git checkout, so nobody knows what to upload: "
            f"git init && git add . && git commit -m all"
        )
    return done.stdout


def inside(file: str) -> str:
    """Its path in the repository."""
    path = Path(file).resolve()
    if not path.is_relative_to(ROOT.resolve()):
        raise ValueError(f"{file} is outside {ROOT}: put it into config/")
    return str(path.relative_to(ROOT.resolve()))


def tracked_files(config_files: list[str]) -> list[str]:
    """ValueError where one of them holds a key."""
    listed = {file for file in git("ls-files", "-z").split("\0") if file} | set(map(inside, config_files))
    files = sorted(file for file in listed if (ROOT / file).is_file() and not is_private(file))
    keys = [os.environ[name].encode() for name in KEYS if os.environ.get(name)]
    for file in files:
        if any(key in (ROOT / file).read_bytes() for key in keys):
            raise ValueError(f"{file} holds one of your keys: take it out; nothing was uploaded")
    return files


def uploaded(files: list[str]) -> str:
    """The commit, and what was changed in these files since."""
    tracked = set(git("ls-files", "-z").split("\0"))
    changes = git("diff", "HEAD", "--", *(file for file in files if file in tracked))
    return redact(f"commit {git('rev-parse', 'HEAD')}{changes}")


def left_behind() -> list[str]:
    """Code that git neither knows nor ignores: a new module that nobody has added yet."""
    others = git("ls-files", "-z", "--others", "--exclude-standard").split("\0")
    return [file for file in others if file.endswith((".py", ".sh"))]


def training(arguments: list[str]) -> tuple[TrainConfig, list[str], list[str]]:
    """(its settings, files to upload, arguments of train.py), checked as far as that can be done from here."""
    config, config_files = parse(TrainConfig, arguments)
    if config.out_dir:
        raise ValueError("--out_dir: the results come to out/<name of the machine>; leave it out")
    if config.init_from == "resume":
        raise ValueError("--init_from=resume: a rented machine begins empty; what was fetched can go on here")
    inner = [inside(file) for file in config_files]
    files = tracked_files(config_files)
    own_data = f"data/{config.dataset}/prepare.py"
    if config.data_dir == "data" and own_data not in files:
        raise ValueError(
            f"{own_data} is not a tracked file, and prepared data is not uploaded: put the data on a --filesystem "
            f"and name it with --data_dir=/lambda/nfs/NAME"
        )
    return config, files, inner + [argument for argument in arguments if argument.startswith("-")]
