"""Typed settings for every script: defaults < config files < command line.

    python train.py config/train_default.py --dag_depth=4 --max_iters=1e3
    python train.py config/train_default.py --help          # every key and the value in force

A script's settings are a frozen dataclass whose fields are declared with `setting(...)`; the default there is
the only one. nanoGPT's configurator.py (https://github.com/karpathy/nanoGPT) is the model for how this feels:
config files are plain Python assignments (`batch_size = 5 * 8`), flags are `--key=value`. Unlike there, a
file runs in a namespace of its own, values are read by the declared type, flags win wherever they stand.

A config file is executed, so run only files you trust. It may import and compute: modules, callables and
names that begin with an underscore are skipped, any other name must be a setting.
"""

import dataclasses
import difflib
import math
import os
import re
import shutil
import sys
import textwrap
import traceback
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NoReturn, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in a config file or on the command line, told on one line that names the source."""

    def __init__(self, source: str, problem: str):
        super().__init__(f"config error ({source}): {problem}")


# ------------------------------------------------------------------------------------------------------------
# declaring settings


def setting(
    default: Any,
    meaning: str,
    *,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    section: str | None = None,
) -> Any:
    """A dataclass field with its meaning and legal values:

        dropout: float = setting(0.0, "rate", minimum=0, below=1)
        num_threads: int | None = setting(None, "CPU threads", section="system")

    `section` heads this field and those after it in `--help`. A subclass that gives a field another default
    inherits whatever it does not restate.
    """
    given = dict(
        meaning=meaning, choices=choices, minimum=minimum, maximum=maximum, below=below, section=section
    )
    metadata = {key: value for key, value in given.items() if value not in (None, ())}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """What is known about one field of a settings class."""

    name: str
    type: type  # int, float, bool or str
    optional: bool  # None is legal, written "none"
    default: Any
    meaning: str = ""
    choices: tuple = ()
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None  # exclusive upper bound
    section: str = ""

    @property
    def type_name(self) -> str:
        low = self.minimum
        high = self.below
        if low is not None and self.maximum is not None:
            limits = f" in [{low:g}, {self.maximum:g}]"
        elif low is not None and high is not None:
            limits = f" in [{low:g}, {high:g})"
        else:
            limits = f" >= {low:g}" if low is not None else f" < {high:g}" if high is not None else ""
        return self.type.__name__ + limits + " or none" * self.optional

    @property
    def legal(self) -> str:
        """What an error message asks for."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}" + " or none" * self.optional
        return {bool: "true or false", float: "a finite " + self.type_name}.get(self.type, self.type_name)


def settings_of(cls: type) -> dict[str, Setting]:
    hints, found = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        options = typing.get_args(hints[field.name]) or (hints[field.name],)
        kinds = [option for option in options if option is not types.NoneType]
        assert len(kinds) == 1 and kinds[0] in READERS, f"{cls.__name__}.{field.name}: unsupported {options}"
        metadata = {}
        for base in reversed(cls.__mro__):
            inherited = getattr(base, "__dataclass_fields__", {}).get(field.name)
            metadata |= inherited.metadata if inherited else {}
        found[field.name] = Setting(field.name, kinds[0], len(options) > 1, field.default, **metadata)
    return found


# ------------------------------------------------------------------------------------------------------------
# reading values: text -> value of the declared type -> checked value


def read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return integral(float(text))  # 1e6


def integral(number: float) -> int:
    if not number.is_integer():  # False for infinity and NaN too
        raise ValueError
    return int(number)


def read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


READERS: dict[type, Callable[[str], Any]] = {int: read_int, float: float, bool: read_bool, str: str}


def fit(item: Setting, value: Any) -> Any:
    """The value in its declared type, where nothing is lost by that and it is legal; ValueError otherwise."""
    if value is None and item.optional:
        return None
    if isinstance(value, bool) and item.choices:
        value = str(value)  # a file may say compile = False where "false" is a choice
    if isinstance(value, bool) != (item.type is bool):  # in Python a bool is an int
        raise ValueError
    if item.type is int and isinstance(value, float):
        value = integral(value)
    if item.type is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, item.type) or (item.type is float and not math.isfinite(value)):
        raise ValueError
    if item.choices:
        value = {str(choice).lower(): choice for choice in item.choices}.get(str(value).lower())
        if value is None:
            raise ValueError
    if item.minimum is not None and value < item.minimum:
        raise ValueError
    if item.maximum is not None and value > item.maximum or item.below is not None and value >= item.below:
        raise ValueError
    return item.type(value)


def convert(item: Setting, given: Any, is_text: bool) -> Any:
    """A field's value from what the user gave: text after `--key=`, or an object from a config file."""
    try:
        if not is_text:
            return fit(item, given)
        if item.optional and given.lower() == "none":
            return None
        return fit(item, READERS[item.type](given))
    except (ValueError, OverflowError):
        raise ValueError(f"{item.name}={given!r}: expected {item.legal}") from None


# ------------------------------------------------------------------------------------------------------------
# files and flags


def nearest(word: str, words: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def named(settings: dict[str, Setting], name: str) -> Setting:
    if name not in settings:
        raise ValueError(f"unknown key {name!r}{nearest(name, settings) or '; --help lists every key'}")
    return settings[name]


def run_file(path: str) -> dict[str, Any]:
    """Execute a config file and return the names that it assigns. ValueError on whatever goes wrong in it."""
    try:
        source = Path(path).read_bytes()
    except FileNotFoundError:
        hint = nearest(path, map(str, Path(path).parent.glob("*.py")))
        raise ValueError(f"no such config file{hint or '; settings are written --key=value'}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    namespace: dict[str, Any] = {"__name__": "config", "__file__": path}
    try:
        exec(compile(source, path, "exec"), namespace)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:  # a config may raise anything, and none of it is ours to handle
        line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {line[-1]}: " if line else ""
        raise ValueError(f"{where}{type(error).__name__}: {error}") from error
    return {
        name: value
        for name, value in namespace.items()
        if not (name.startswith("_") or isinstance(value, types.ModuleType) or callable(value))
    }


def split_flag(argument: str) -> tuple[str, str]:
    name, equals, text = argument.removeprefix("--").partition("=")
    if not (argument.startswith("--") and equals):
        raise ValueError(f"{argument!r}: settings are written --{name.lstrip('-') or 'key'}=value")
    return name, text


def parse(
    cls: type[T], argv: list[str], base: dict[str, Any] | None = None, check: bool = True
) -> tuple[T, list[str]]:
    """Settings, and the config files they came from. Raises ConfigError; `--help` prints and exits 0.

    `base` stands in for the defaults: what a saved run was made with. Names in it that are no longer settings
    are passed over. `check=False` leaves out the class's own `check`, for a first look at a few settings.
    """
    settings = settings_of(cls)
    arguments = [a for a in argv if a not in ("--help", "-h")]
    files = [a for a in arguments if not a.startswith("-")]
    values: dict[str, Any] = {}
    source = "saved run"
    try:
        for name in settings.keys() & (base or {}).keys():
            values[name] = convert(settings[name], base[name], is_text=False)
        source = "command line"
        flags = [split_flag(a) for a in arguments if a.startswith("-")]
        for source in files:
            for name, value in run_file(source).items():
                values[name] = convert(named(settings, name), value, is_text=False)
        source = "command line"
        for name, text in flags:
            values[name] = convert(named(settings, name), text, is_text=True)
        config = cls(**values)
        if len(arguments) < len(argv):
            print(help_text(config))
            raise SystemExit(0)
        source = ", ".join(files + ["command line"] * bool(flags)) or "defaults"
        if check and hasattr(config, "check"):
            config.check()
    except ValueError as error:
        raise ConfigError(source, one_line(error)) from error
    return config, files


def load_with_files(
    cls: type[T], argv: list[str] | None = None, base: dict[str, Any] | None = None, check: bool = True
) -> tuple[T, list[str]]:
    """`parse` for scripts: a mistake in sys.argv ends the program with one line on stderr and exit code 2."""
    try:
        return parse(cls, sys.argv[1:] if argv is None else argv, base, check)
    except ConfigError as error:
        report(error)


def load(cls: type[T], argv: list[str] | None = None) -> T:
    return load_with_files(cls, argv)[0]


def help_text(config: Any) -> str:
    """A table of settings: key, value in force, type, meaning, choices, and the default where it differs."""

    def show(value: Any) -> str:
        return {None: "none", "": "''"}.get(value, str(value))

    settings = settings_of(type(config))
    rows = [(name, show(getattr(config, name)), item.type_name) for name, item in settings.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    indent = sum(widths) + 8
    wrap = textwrap.TextWrapper(
        width=max(indent + 40, shutil.get_terminal_size((120, 0)).columns),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )
    lines = [
        f"usage: python {Path(sys.argv[0]).name} [CONFIG.py ...] [--key=value ...] [--help]",
        "Later config files win over earlier ones, flags over files. TRACEBACK=1 prints tracebacks.",
    ]
    for row, item in zip(rows, settings.values()):
        if item.section:
            lines += ["", item.section]
        meaning = item.meaning + (f"; one of {', '.join(map(str, item.choices))}" if item.choices else "")
        if getattr(config, item.name) != item.default:
            meaning += f" [default {show(item.default)}]"
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        lines += wrap.wrap(f"  {cells}  {meaning}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# for scripts


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def pick(config: Any, cls: type[T], **overrides: Any) -> T:
    """A dataclass built from equally named fields: `pick(config, GPTConfig, vocab_size=50257)`."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(cls) if hasattr(config, f.name)}
    return cls(**shared | overrides)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def report(error: BaseException) -> NoReturn:
    """Tell the user on one line of stderr what is wrong, and end with exit code 2."""
    print(one_line(error) if isinstance(error, ConfigError) else f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; what a user can mend (ValueError, OSError, a missing package) is one line and exit code 2.
    TRACEBACK=1 in the environment prints the traceback above that line.
    """
    try:
        main()
    except BrokenPipeError:  # the reader of our output has left, `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRACEBACK") == "1":
            traceback.print_exc()
        report(error)
