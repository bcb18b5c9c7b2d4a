"""Train a GPT with a differentiable DAG on it, or with --dag_depth=0 the plain GPT.

    python train.py config/train_default.py --dag_depth=4               # CPU, minutes, prepares its own data
    python train.py config/train_default.py --dag_depth=0               # the baseline: same code path
    python train.py --init_from=resume --out_dir=out/train_default-001 --max_iters=4000
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Read top to bottom: helpers, then configuration, setup, data, model, optimizer, loop. A run writes a folder:
config.json, run.json (command, commit, versions), changes.diff, metrics.jsonl, best-*/ and last-*/ checkpoints, and
at its end report.md with curves.png and plan.png.
The loop follows nanoGPT's train.py (https://github.com/karpathy/nanoGPT); `gradient_accumulation_steps` is,
as there, the number of micro-batches of one step over all processes.
"""

import atexit
import contextlib
import gc
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.parallel import DistributedDataParallel

from configurator import load_with_files, pick, run_script, to_dict
from dag_logger import DAGLogger
from dag_model import GPT, GPTConfig
from data import loader as dataloader
from data import tokenizer as tokenizers
from evals import answers
from evals.dag_metrics import Watch
from evals.failures import writable
from inference.engine import generate
from inference.explain import explain
from plots.plan_figures import draw_dag
from plots.run_report import attempt_line, some_of, write_report
from training import checkpoint, optim
from training import device as runtime
from training.train_config import TrainConfig

ROOT = Path(__file__).parent
SAMPLE_TOKENS = 200  # of the text in report.md


# ----------------------------------------------------------------------------------------------------
# The run folder


def numbered_runs(files: list[str]) -> tuple[str, dict[int, Path]]:
    """out/<config name>, and its runs out/<config name>-NNN by their numbers."""
    stem = str(Path("out") / (Path(files[-1]).stem if files else "train"))
    names = {
        path: re.fullmatch(re.escape(stem) + r"-(\d{3,})", str(path)) for path in Path("out").glob("*-*")
    }
    return stem, {int(match[1]): path for path, match in names.items() if match}


def make_run_dir(config: TrainConfig, files: list[str]) -> Path:
    """Makes `out_dir`, or a new out/<config name>-NNN. ValueError where there is a run already."""
    if not config.out_dir:
        stem, runs = numbered_runs(files)
        run_dir = Path(f"{stem}-{max(runs, default=0) + 1:03d}")
        run_dir.mkdir(parents=True)  # an error where another run has just taken it
        return run_dir
    run_dir = Path(config.out_dir)
    if checkpoint.find(run_dir) or any(
        (run_dir / name).exists() for name in ("config.json", "metrics.jsonl")
    ):
        raise ValueError(
            f"{run_dir} already holds a run and is left as it is: continue it with --init_from=resume, "
            f"or name another --out_dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def old_run_dir(config: TrainConfig, files: list[str]) -> Path:
    """The run to resume: `out_dir`, or the newest out/<config name>-NNN."""
    if config.out_dir:
        if checkpoint.NAME.fullmatch(Path(config.out_dir).name):
            raise ValueError(
                f"{config.out_dir} is a checkpoint: give its run, --out_dir={Path(config.out_dir).parent}"
            )
        return Path(config.out_dir)
    stem, runs = numbered_runs(files)
    if not runs:
        raise ValueError(f"nothing to resume: no run {stem}-NNN here; name one with --out_dir=RUN")
    return runs[max(runs)]


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def write_run_files(
    run_dir: Path, config: TrainConfig, hardware: str, resumed_at: int | None, probes: list[str]
) -> dict:
    """What is needed to understand and repeat the run; a resumed one gets files of its own for that part."""
    part = "" if resumed_at is None else f"-{resumed_at:08d}"
    (run_dir / f"config{part}.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    run = dict(command=[sys.executable, *sys.argv], commit=(git("rev-parse", "HEAD") or "").strip() or None)
    run |= dict(hardware=hardware, python=sys.version.split()[0], started=time.strftime("%Y-%m-%d %H:%M:%S"))
    run |= dict(probes=probes)  # probe/0 of metrics.jsonl, and so on
    (run_dir / f"run{part}.json").write_text(json.dumps(run, indent=2) + "\n")
    (run_dir / f"changes{part}.diff").write_text(git("diff", "HEAD") or "", encoding="utf-8")
    return run


# ----------------------------------------------------------------------------------------------------
# Data and model


def validation_problems(data_dir: Path, count: int) -> dict[str, list[answers.Problem]]:
    """About `count` problems, as many from every val_* split, by the rest of its name."""
    splits = answers.splits(data_dir, prefix="val_") if count else {}
    each = -(-count // max(len(splits), 1))
    return {name.removeprefix("val_"): answers.read_problems(path)[:each] for name, path in splits.items()}


def initial_model(
    config: TrainConfig, tokenizer, separator_id: int, saved: checkpoint.Checkpoint | None
) -> GPT:
    """The model to train: fresh, resumed from `saved`, or GPT-2's weights under a fresh DAG."""
    text = dict(vocab_size=tokenizer.vocab_size, separator_id=separator_id)
    if saved is not None:
        model = checkpoint.rebuild_model(saved, dropout=config.dropout)
        asked = pick(config, GPTConfig, **text)
        for name, value in asdict(model.config).items():
            if getattr(asked, name) != value:
                raise ValueError(
                    f"{name}={getattr(asked, name)} does not fit the checkpoint, which has {value}"
                )
        return model
    if config.init_from == "scratch":
        return GPT(pick(config, GPTConfig, **text), tokenizer.vocabulary)
    if tokenizer.kind != "gpt2":
        raise ValueError(
            f"init_from={config.init_from} needs a dataset in GPT-2's tokens, not {tokenizer.kind}"
        )
    dag = {name: value for name, value in to_dict(config).items() if name.startswith("dag_")}
    dag |= dict(dropout=config.dropout, separator_id=separator_id)
    model = GPT.from_huggingface(config.init_from, tokenizer.vocabulary, **dag)
    model.crop_block_size(config.block_size)
    return model


# ----------------------------------------------------------------------------------------------------
# What a person sees


class Display:
    """A live bar on a terminal, plain lines elsewhere, silence on all ranks but the first."""

    def __init__(self, total: int, done: int, is_main: bool, loss_name: str):
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns)
        self.live = is_main and self.bar.console.is_terminal
        atexit.register(self.close)  # an error must not leave the terminal without its cursor
        self.is_main, self.total, self.loss_name = is_main, total, loss_name
        self.task = self.bar.add_task("", total=total, completed=done)
        if self.live:
            self.bar.start()

    def step(self, done: int, loss: float, seconds: float, tokens_per_second: float) -> None:
        text = f"{self.loss_name} {loss:.4f}  {tokens_per_second / 1e3:.1f}k tok/s"
        if self.live:
            self.bar.update(self.task, completed=done, description=text)
        elif self.is_main:
            left = (self.total - done) * seconds
            print(f"step {done}/{self.total}  {text}  {seconds * 1e3:.1f} ms  {left:.0f} s left", flush=True)

    def say(self, text: str = "") -> None:
        if self.is_main:
            self.bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            sys.stdout.flush()

    def close(self) -> None:
        if self.live:
            self.bar.stop()


def share_solved(attempts: list[answers.Attempt]) -> float:
    return sum(attempt.correct for attempt in attempts) / len(attempts)


def draw_plan(
    model: GPT, tokenizer: tokenizers.Tokenizer, problems: list[answers.Problem], path: Path
) -> bool:
    """A picture of the longest problem's plan; False where there is none."""
    told = [problem for problem in problems if writable(tokenizer, problem.answer)]
    problem = max(told, key=lambda problem: len(problem.prompt), default=answers.Problem("", ""))
    prompt, answer = tokenizer.encode(problem.prompt), tokenizer.encode(problem.answer)
    thoughts = explain(model, tokenizer, prompt + answer, start=len(prompt)).thoughts
    if thoughts:
        draw_dag(thoughts, [tokenizer.decode([token]) for token in prompt + answer]).savefig(path)
    return len(thoughts) > 0


class StopFlag:
    """Set by SIGINT or SIGTERM. A second SIGINT ends the program as usual; SIGTERM may come twice, as torchrun passes
    on to its processes what SLURM has sent to all.
    """

    def __init__(self):
        self.signal: int | None = None
        self.previous = {
            number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _set(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def raised(self, processes: runtime.Processes) -> bool:
        """Whether any process was told to stop: all of them leave the loop after the same step."""
        return processes.mean(float(self.signal is not None)) > 0


# ----------------------------------------------------------------------------------------------------
# The run


def main() -> None:
    # ------------------------------------------------------------------------------ configuration
    config, files = load_with_files(TrainConfig, check="--init_from=resume" not in sys.argv)
    saved = None
    if config.init_from == "resume":
        run_dir = old_run_dir(config, files)
        saved = checkpoint.load(run_dir, "last")
        # the run's own settings, then the flags of this command; a config file here only names the run
        flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
        config, _ = load_with_files(TrainConfig, flags, base=saved.train_config)

    # -------------------------------------------------------------------------------------- setup
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    processes, device = runtime.start_processes(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    hardware = runtime.describe(device, dtype, processes)
    accumulation, remainder = divmod(config.gradient_accumulation_steps, processes.world_size)
    if remainder:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} counts the micro-batches of all "
            f"{processes.world_size} processes: make it a multiple of {processes.world_size}"
        )
    torch.manual_seed(config.seed)  # the same on every rank until the weights exist
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

    # --------------------------------------------------------------------------------------- data
    data_dir = processes.agree(lambda: dataloader.prepared(Path(config.data_dir), config.dataset))
    meta = dataloader.read_meta(data_dir)
    if saved is not None:
        checkpoint.require_vocabulary(saved, meta)
    tokenizer = tokenizers.from_json(meta["tokenizer"])

    def loader(split: str, seed: int) -> dataloader.Loader:
        return dataloader.Loader(
            data_dir,
            split,
            batch_size=config.batch_size,
            block_size=config.block_size,
            seed=seed,
            rank=processes.rank,
            world_size=processes.world_size,
        )

    train_loader = loader("train", config.seed)
    eval_loaders = {split: loader(split, config.seed + 1) for split in ("train", "val")}
    problems_by_kind = validation_problems(data_dir, config.eval_problems)
    problems = [problem for kind in problems_by_kind.values() for problem in kind]

    # -------------------------------------------------------------------------------------- model
    separator_id = meta["separator_id"] if meta["documents"] else -1
    model = initial_model(config, tokenizer, separator_id, saved).to(device)
    shape = asdict(model.config)  # GPT-2's weights have a shape of their own: what is saved must name it
    config = replace(config, **{name: value for name, value in shape.items() if hasattr(config, name)})

    def to_device(batch):
        if device.type != "cuda":
            return [tensor.to(device) for tensor in batch]
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]

    def loss_of(network, batch) -> torch.Tensor:
        with runtime.autocast(device, dtype):
            return network(*to_device(batch))[1]

    trial_batch = eval_loaders["train"].next_batch()
    compiled = runtime.compile_model(
        model, config.compile, device, lambda m: loss_of(m, trial_batch).backward()
    )
    network = compiled
    if processes.world_size > 1:
        network = DistributedDataParallel(
            compiled, device_ids=[device.index] if device.type == "cuda" else None
        )

    # ---------------------------------------------------------------------------------- optimizer
    optimizer = optim.make_optimizer(
        model, config.learning_rate, (config.beta1, config.beta2), config.weight_decay
    )
    iteration, best_loss, stale, run_id = 0, math.inf, 0, None
    if saved is None:
        torch.manual_seed(config.seed + processes.rank)  # dropout differs between ranks from here on
        run_dir = None if config.eval_only else processes.agree(lambda: make_run_dir(config, files))
    else:
        optim.restore(optimizer, saved.optimizer)
        train_loader.load_state_dict(saved.loader)
        iteration, best_loss = saved.step, saved.best_val_loss
        stale, run_id = saved.progress["stale"], saved.progress["wandb_run_id"]
        if processes.world_size == 1:
            checkpoint.restore_rng(saved.rng)
        else:
            # the saved state is rank 0's; another dropout from here on, not the same on two ranks or at two steps
            torch.manual_seed(config.seed + processes.rank + 1_000_003 * (iteration + 1))
    resumed_at = iteration if saved else None

    watch = None
    if model.dag is not None:
        watch = Watch.of(model, tokenizer, *to_device(eval_loaders["val"].next_batch()), problems)
    run_card, writes = {}, processes.is_main and not config.eval_only
    if writes:
        probes = [problem.prompt for problem in watch.probes] if watch else []
        run_card = write_run_files(run_dir, config, hardware, resumed_at, probes)
    logger = DAGLogger(
        run_dir if writes else None,
        to_dict(config) | {"run": run_card},
        wandb_log=config.wandb_log,
        project=config.wandb_project,
        run_name=config.wandb_run_name,
        mode=config.wandb_mode,
        artifacts=config.wandb_artifacts,
        run_id=run_id,
        resume_step=resumed_at,
    )
    logger.watch = watch
    loss_name = (
        "loss + planner's" if model.reads_numbers else "loss"
    )  # as evaluations tell of the text's alone
    display = Display(config.max_iters, iteration, processes.is_main, loss_name)
    plain = "plain GPT" if model.dag is None else f"GPT with a DAG of depth {config.dag_depth}"
    display.say(f"{plain}, {model.num_parameters() / 1e6:.2f} M parameters, on {hardware}")
    where = "" if config.eval_only else f"; run folder {run_dir}"
    display.say(f"{meta['splits']['train']['tokens'] / 1e6:.1f} M training tokens in {data_dir}{where}")

    attempts_by_kind = {}

    def evaluate() -> dict[str, float]:
        """Losses over the same batches every time, problems by their kind, and what the DAG does."""
        model.eval()
        scores = {}
        for split, batches in eval_loaders.items():
            loss = answers.mean_loss(compiled, batches, config.eval_iters, device, dtype)
            scores[f"{split}/loss"] = processes.mean(loss)
        display.say(
            f"step {iteration}: train loss {scores['train/loss']:.4f}, val loss {scores['val/loss']:.4f}"
        )
        if processes.is_main and problems:
            attempts = answers.solve(model, tokenizer, problems)
            solved = iter(attempts)
            for kind, asked in problems_by_kind.items():
                attempts_by_kind[kind] = [next(solved) for _ in asked]
            scores["val/solved"] = share_solved(attempts)
            for kind, tried in attempts_by_kind.items():
                scores[f"val/solved/{kind}"] = share_solved(tried)
            display.say(f"  {scores['val/solved']:.1%} of {len(attempts)} validation problems solved")
            for attempt in some_of(attempts):
                display.say(f"    {attempt_line(attempt)}")
            logger.log_problems(iteration, model, tokenizer, attempts_by_kind)
        with runtime.autocast(device, dtype):
            scores |= logger.get_wandb_logging_dict(model)
        model.train()
        return scores

    def save(kind: str) -> None:
        if not processes.is_main:
            return
        state = checkpoint.Checkpoint(
            step=iteration,
            best_val_loss=best_loss,
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            model_config=asdict(model.config),
            train_config=to_dict(config),
            loader=train_loader.state_dict(),
            rng=checkpoint.capture_rng(),
            tokenizer=tokenizer.to_json(),
            progress=dict(stale=stale, wandb_run_id=logger.run_id, minutes=minutes),
        )
        logger.log_checkpoint(checkpoint.save(run_dir, kind, state), kind)

    def require_finite(loss: float) -> None:
        if not math.isfinite(loss):
            logger.finish(exit_code=1)
            raise SystemExit(  # exit code 1
                f"error: the loss is {loss} at step {iteration}; nothing of that was saved. Go on from the last "
                f"good checkpoint with a lower --learning_rate or --grad_clip: "
                f"python train.py --init_from=resume --out_dir={run_dir}"
            )

    # --------------------------------------------------------------------------------------- loop
    gc.collect()
    gc.freeze()  # plans are many small lists; the collector need not look through all of PyTorch for each
    stop = StopFlag()
    loss_sum = torch.zeros((), device=device)
    since, since_iteration = time.perf_counter(), iteration
    minutes = saved.progress.get("minutes", 0.0) if saved else 0.0  # of training alone
    started = since - 60 * minutes  # as if it had never been interrupted
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    if iteration >= config.max_iters and not config.eval_only:
        display.say(f"already at step {iteration}: nothing to do until --max_iters is larger")
    while True:
        # evaluate and save
        due = iteration % config.eval_interval == 0 or iteration == config.max_iters
        if config.eval_only or (due and iteration != resumed_at):
            paused = time.perf_counter()
            minutes = (paused - started) / 60
            scores = evaluate() | {"train/minutes": minutes}
            require_finite(scores["val/loss"])
            logger.log(iteration, scores)
            if config.eval_only:
                break
            improved = scores["val/loss"] < best_loss
            best_loss, stale = min(scores["val/loss"], best_loss), 0 if improved else stale + 1
            if improved:
                save("best")  # before "last", which says that there is one
            save("last")
            pause = time.perf_counter() - paused  # evaluation is not training time
            since, started = since + pause, started + pause

        # stop test
        if iteration >= config.max_iters:
            break
        if config.patience and stale >= config.patience:
            display.say(
                f"no better validation loss in {stale} evaluations: stopping early at step {iteration}"
            )
            break
        if stop.raised(processes):
            display.say(f"asked to stop: saving at step {iteration}")
            require_finite(processes.mean(loss_sum.item()))
            minutes = (time.perf_counter() - started) / 60
            logger.log(iteration, {"train/minutes": minutes})
            save("last")
            break

        # micro-steps
        rate = optim.learning_rate_at(
            iteration,
            config.schedule,
            config.learning_rate,
            config.min_lr,
            config.warmup_iters,
            config.lr_decay_iters or config.max_iters,
            config.wsd_decay_iters or config.max_iters // 5,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)  # here, so that an evaluation still finds the gradients
        loss_sum = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            hold = processes.world_size > 1 and micro_step < accumulation - 1  # ranks average once a step
            with network.no_sync() if hold else contextlib.nullcontext():
                micro_loss = loss_of(network, train_loader.next_batch()) / accumulation
                micro_loss.backward()
            loss_sum += micro_loss.detach()

        # step
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        optimizer.step()
        iteration += 1

        # log
        if iteration % config.log_interval == 0:
            loss = processes.mean(loss_sum.item())  # the host waits for the device
            require_finite(loss)
            now = time.perf_counter()
            seconds = (now - since) / (iteration - since_iteration)
            since, since_iteration = now, iteration
            display.step(iteration, loss, seconds, tokens_per_step / seconds)
            speed = {"step_ms": seconds * 1e3, "tokens_per_second": tokens_per_step / seconds}
            progress = {"train/batch_loss": loss, "learning_rate": rate, "gradient_norm": norm.item()}
            logger.log(iteration, progress | speed | logger.hits_since(model))

    # --------------------------------------------------------------------------------------- end
    stop.restore()
    display.close()
    if writes and iteration != resumed_at:
        sample = generate(
            model.eval(), [[tokenizer.separator_id]], SAMPLE_TOKENS, temperature=0.8, seed=config.seed
        )
        headline = f"{plain}, {model.num_parameters() / 1e6:.2f} M parameters"
        drawn = partial(draw_plan, model, tokenizer, problems)
        write_report(run_dir, headline, attempts_by_kind, [tokenizer.decode(sample[0])], drawn)
        logger.log_pictures(iteration, {name: run_dir / f"{name}.png" for name in ("curves", "plan")})
    logger.finish()
    if writes:
        start = min((problem.prompt for problem in problems), key=len, default="")  # empty begins a document
        longer = f" --max_iters={2 * iteration}" if iteration >= config.max_iters else ""
        print(
            f"checkpoints in {run_dir}: last at step {iteration}, best at validation loss {best_loss:.4f}. Try next:"
        )
        which = " --checkpoint=last" if stop.signal else ""  # the best is only as new as the last evaluation
        print(f'  python sample.py --out_dir={run_dir}{which} --start="{start}"')
        print(f"  python eval.py --out_dir={run_dir}{which}")
        print(f"  python train.py --init_from=resume --out_dir={run_dir}{longer}")
    processes.close()


def run() -> None:
    try:
        main()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{error} Use a smaller --batch_size and as much more --gradient_accumulation_steps"
        ) from error


if __name__ == "__main__":
    run_script(run)
