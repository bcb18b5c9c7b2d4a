"""The settings of a model: their defaults, ranges, choices, and which of them go together.

The single definition: the model is built from GPTConfig, training/train_config.py inherits ModelSettings, and so the
command line, checkpoints and the launchers, which run where no torch is installed, all refuse the same values in the
same words. What a field means stands in its metadata, as configurator.py reads it.
"""

from dataclasses import dataclass, field, fields
from typing import Any

OPERATIONS = ("add", "subtract", "multiply", "divide", "identity", "power", "log", "max", "min")
RELAXATIONS = ("soft", "straight_through")  # plans as mixtures, or hard choices with the mixture's gradient
DENSE_CHOICES = dict(dag_values=("learned",), dag_plan=RELAXATIONS, dag_fold=("value",))
CHOICES_BY_INPUTS = {  # what three other settings may be depends on dag_inputs
    "numbers": dict(
        dag_values=("literal", "learned"),
        dag_plan=("searched", "sampled", *RELAXATIONS),
        dag_fold=("digits",),
    ),
    "token": DENSE_CHOICES,
    "sequence": DENSE_CHOICES,
}


def _setting(default: Any, meaning: str, **limits: Any) -> Any:
    """Declare a field with its meaning and its limits: `choices`, `minimum`, `maximum`, `below` (exclusive), `section`."""
    return field(default=default, metadata=dict(meaning=meaning, **limits))


def _choices_of(setting: str) -> tuple[str, ...]:
    """Return every value that a setting has with some dag_inputs, each once."""
    return tuple(dict.fromkeys(value for legal in CHOICES_BY_INPUTS.values() for value in legal[setting]))


def operation_names(dag_ops: str) -> list[str]:
    """Return the operations that `dag_ops` names, in its order; raise ValueError for an unknown or a doubled one.

    >>> operation_names("multiply, add")
    ['multiply', 'add']
    """
    names = list(OPERATIONS) if dag_ops == "all" else [name.strip() for name in dag_ops.split(",")]
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"dag_ops names {name!r}; choose from {', '.join(OPERATIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"dag_ops={dag_ops} names an operation twice")
    return names


@dataclass(frozen=True)
class ModelSettings:
    """What a person chooses of a model."""

    block_size: int = _setting(128, "tokens per row: the longest context", minimum=1, section="model")
    n_layer: int = _setting(4, "transformer blocks", minimum=1)
    n_head: int = _setting(4, "attention heads per block", minimum=1)
    n_embd: int = _setting(128, "width, a multiple of n_head", minimum=1)
    dropout: float = _setting(0.0, "rate; 0 for pretraining, 0.1 and more for finetuning", minimum=0, below=1)
    bias: bool = _setting(False, "biases in linear layers and layer norms, as in GPT-2")

    dag_depth: int = _setting(4, "steps of the computation; 0 is the plain GPT", minimum=0, section="dag")
    dag_inputs: str = _setting(
        "numbers",
        "what plans compute with: the numbers of the text, the token's own value, a value of every token so far",
        choices=tuple(CHOICES_BY_INPUTS),
    )
    dag_values: str = _setting("literal", "how input values are read", choices=_choices_of("dag_values"))
    dag_plan: str = _setting("searched", "how plans are made and learned", choices=_choices_of("dag_plan"))
    dag_fold: str = _setting(
        "digits", "how the result returns to the hidden state", choices=_choices_of("dag_fold")
    )
    dag_ops: str = _setting("all", "operations by name, separated by commas, or all")
    dag_num_inputs: int = _setting(8, "the newest numbers that a plan can see", minimum=1)
    dag_thousands: bool = _setting(False, "read 1,234 as one number; then write max(12, 345) with a blank")
    dag_digits: int = _setting(36, "digits that exact results may have", minimum=1)
    dag_leaves: int = _setting(
        3,
        "numbers in the longest plans searched for the loss; with all operations 4 are many",
        minimum=1,
        below=6,
    )
    dag_samples: int = _setting(64, "plans drawn for a number that has none yet, if sampled", minimum=1)
    dag_exploration: float = _setting(
        0.1, "share of choices at random while plans are drawn", minimum=0, below=1
    )
    dag_max_searched_plans: int = _setting(2**21, "plans that are run in one search", minimum=1)
    dag_max_consistent_plans: int = _setting(1024, "plans that a search returns", minimum=1)
    dag_min_search_probability: float = _setting(
        0.1, "of a search where the gate is shut and the own plan fails", minimum=0, maximum=1
    )
    dag_strict_probability: float = _setting(
        0.25,
        "odds that of plans which copy or compare alone only those that compare most count",
        minimum=0,
        maximum=1,
    )
    dag_other_format_weight: float = _setting(
        0.9, "weight of the other formats where the exact one is right as well", minimum=0, maximum=1
    )
    dag_min_gate_to_plan: float = _setting(
        0.1, "gate below which nothing is planned, once training is over", minimum=0, maximum=1
    )
    dag_min_gate_to_train: float = _setting(
        0.01, "gate below which training plans nothing where no number follows", minimum=0, maximum=1
    )
    dag_full_digits: int = _setting(2, "digits of a number that the trunk sees in full", minimum=1)
    dag_digit_decay: float = _setting(
        0.5,
        "attention weight of each digit beyond these, in weights of the one before",
        minimum=1e-6,
        maximum=1,
    )
    dag_context: str = _setting(
        "linear", "what values and plans are read from", choices=("linear", "attention")
    )
    dag_post_block: bool = _setting(False, "a transformer block between the result and the fold")
    dag_gate: bool = _setting(True, "a learned gate on the fold")

    def check(self) -> None:
        """Raise ValueError, with the legal values, for settings that no model can be built from."""
        for item in fields(self):
            if item.name not in DENSE_CHOICES:  # their choices depend on dag_inputs
                self._check_limits(item.name, **item.metadata)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        for name, legal in CHOICES_BY_INPUTS[self.dag_inputs].items():
            if getattr(self, name) not in legal:
                chosen = f"{name} is {getattr(self, name)!r}"
                raise ValueError(
                    f"{chosen}; choose from {', '.join(legal)} with dag_inputs={self.dag_inputs}"
                )
        names = operation_names(self.dag_ops)
        if self.dag_depth > 0 and self.dag_inputs == "numbers" and "identity" not in names:
            raise ValueError(f"dag_ops={self.dag_ops} lacks identity, with which a plan ends: add it")

    def _check_limits(self, name, *, minimum=None, maximum=None, below=None, choices=(), **_) -> None:
        value = getattr(self, name)
        if minimum is not None and value < minimum:
            raise ValueError(f"{name} is {value}; it must be at least {minimum}")
        if maximum is not None and value > maximum:
            raise ValueError(f"{name} is {value}; it must be at most {maximum}")
        if below is not None and value >= below:
            raise ValueError(f"{name} is {value}; it must be below {below}")
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}; choose from {', '.join(choices)}")


@dataclass(frozen=True)
class GPTConfig(ModelSettings):
    """A model's settings, and what its data set says of it."""

    vocab_size: int = _setting(65, "tokens in the vocabulary", minimum=1)
    separator_id: int = _setting(
        -1, "attention and positions begin anew after this token; -1 for one endless text"
    )
