"""Training with the answers to the question that the DAG otherwise has to find: which plan? An upper bound.

    python runs/train_labelled.py config/train_default.py --out_dir=out/labelled

The generator of `arithmetic` knows what it computed. Here the planner learns that plan alone, where everything else
is as in train.py: no search, no coincidences. Never a headline, as no text comes with such labels.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dag_model  # noqa: E402
import train  # noqa: E402
from configurator import run_script  # noqa: E402
from dag.plan_loss import PlanLoss, format_weights  # noqa: E402
from dag.plan_search import Plans, run  # noqa: E402
from data import synthetic as ar  # noqa: E402

SIGNED = re.compile(r"(?<![\d)])-?\d+(?:\.\d+)?")  # as the generator writes numbers: 5-3, 5 - -3, -5*3

Step = tuple[str, int, int]  # operation, slots


class Term:
    """A number or a result that writes down what is done with it."""

    def __init__(self, slot: int, steps: list[Step], inputs: int):
        self.slot, self.steps, self.inputs = slot, steps, inputs

    def _do(self, operation: str, other: "Term") -> "Term":
        self.steps.append((operation, self.slot, other.slot))
        return Term(self.inputs + len(self.steps) - 1, self.steps, self.inputs)

    def __add__(self, other):
        return self._do("add", other)

    def __sub__(self, other):
        return self._do("subtract", other)

    def __mul__(self, other):
        return self._do("multiply", other)


def key_of(numbers, answer) -> tuple[str, ...]:
    """Numbers, the newest first, and what follows them: enough to tell a line of the corpus again."""
    return tuple(f"{float(number):.10g}" for number in (*numbers, answer))


def generator():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data/arithmetic/prepare.py")
    sys.modules["prepare"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw_labels(prepare, settings, inputs: int) -> dict[tuple[str, ...], list[Step]]:
    """The plan of every line of the training corpus that has one, over slots of `inputs` numbers. Lines that
    look the same here and were made differently, as 2+2=4 and 2*2=4, are left out, and those of more numbers.

    `prepare` is generator(), `settings` are its Settings.
    """
    corpus = ar.draw_corpus(settings.seed, prepare.interpolation(settings), prepare.MIX, settings.lines)
    templates = []
    for template, value in prepare.TEMPLATES.items():
        names = re.findall(r"{([abc])}", template)
        pattern = re.escape(template.strip()).replace(r"\{name\}", r"\w+").replace(r"\{item\}", r"\w+")
        templates.append((re.compile(re.sub(r"\\{[abc]\\}", r"(\\d+)", pattern)), names, value))
    labels = {}
    for line in corpus["train"]:
        prompt, _, answer = line.rpartition("=" if "=" in line else " ")
        numbers = [match[0] for match in SIGNED.finditer(prompt)]
        if len(numbers) > inputs:
            continue
        steps: list[Step] = []
        terms = [Term(len(numbers) - 1 - n, steps, inputs) for n in range(len(numbers))]
        if "=" in line:
            places = iter(range(len(terms)))
            eval(SIGNED.sub(lambda _: f"t[{next(places)}]", prompt), {"t": terms})
        else:
            for pattern, names, value in templates:
                if pattern.fullmatch(prompt.strip()):
                    value(**dict(zip(names, terms)))
        if steps:
            key = key_of(numbers[::-1], answer)
            labels[key] = steps if labels.get(key, steps) == steps else []
    return {key: steps for key, steps in labels.items() if steps}


class LabelledLoss(PlanLoss):
    """Learns the labels' plans, and the format from the text as ever."""

    def __init__(self, config, names):
        super().__init__(config, names)
        K = config.dag_num_inputs
        D, prepare = config.dag_depth, generator()
        end = [(names.index("identity"), K + n - 1, 0) for n in range(D)]  # passes the last result on
        self.labels = {
            key: [(names.index(name), a, b) for name, a, b in steps] + end[len(steps) :]
            for key, steps in draw_labels(prepare, prepare.Settings(), K).items()
            if len(steps) <= D and {name for name, _, _ in steps} <= set(names)
        }

    def forward(self, planner, plans, sight, target, odds):
        numbers, answers = sight.values.tolist(), target.value.tolist()
        keys = [key_of((x for x in row if x == x), answer) for row, answer in zip(numbers, answers)]
        device = sight.values.device
        n = [n for n, key in enumerate(keys) if key in self.labels]
        if len(n) == 0:
            return 0.0 * sum(parameter.sum() for parameter in planner.parameters())
        labels = torch.tensor([self.labels[keys[row]] for row in n], device=device)
        labels = planner.canonical(Plans(*labels.unbind(-1)))
        n = torch.tensor(n, device=device)
        sight, target = sight[n], target[n]
        right = target.formats(run(labels, sight.values, self.names))
        context, keys = planner.read(sight.hidden, sight.readers)
        log_p, formats = planner.log_probability(context, keys, sight.inputs, labels)
        return -(
            log_p + (formats + format_weights(right, self.config.dag_other_format_weight)).logsumexp(-1)
        ).mean()


if __name__ == "__main__":
    dag_model.PlanLoss = LabelledLoss
    run_script(train.main)
