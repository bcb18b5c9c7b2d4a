"""A GPT with a differentiable DAG: read this file first.

After the transformer's last LayerNorm every position may plan a short computation, run it, and fold the
result back into its hidden state before the language-model head. With dag_depth=0 the same class is the
plain GPT, and the baseline.

    text -> GPT trunk -> hidden -> values -> plan -> execute -> fold -> hidden -> head -> text

- trunk: GPT-2 (Radford et al. 2019) as nanoGPT shapes it; loads Hugging Face's weights
- DAG: an append-only list of S = K + D slots a position. K inputs hold values, each of the D = dag_depth
  steps picks two visible slots and an operation, and appends its result. Nothing is ever overwritten.
- visibility is masked before the softmax, so the visible operands always carry all of the probability
- an operation that has no value there (x/0, log of x <= 0, a result out of range) makes its slot invalid
- causal at every position; deterministic in eval; finite values and gradients at any depth
- four independent choices, each a string with a registry: INPUTS, VALUES, PLANS, FOLDS

Legend: B batch, T tokens, C width, K inputs, D steps, S = K + D slots, O operations, P positions in a cache.
"""

import math
from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import Cache, CausalSelfAttention
from layers import Block


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 128  # tokens of context
    vocab_size: int = 65  # tokens in the vocabulary
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128  # width C
    dropout: float = 0.0  # probability, 0 to 1
    bias: bool = False  # biases in linear maps and LayerNorms, as GPT-2 has them
    dag_depth: int = 4  # steps D; 0 is the plain GPT
    dag_inputs: str = "token"  # a key of INPUTS
    dag_values: str = "learned"  # a key of VALUES
    dag_plan: str = "straight_through"  # a key of PLANS
    dag_fold: str = "value"  # a key of FOLDS
    dag_ops: str = "all"  # keys of OPERATIONS separated by commas, or "all"
    dag_context: str = "linear"  # a key of CONTEXTS: what values and plans are read from
    dag_post_block: bool = False  # a transformer block between the executed result and the fold
    dag_gate: bool = True  # a learned gate on the fold; without it the result is always added


# ----------------------------------------------------------------------------------------------------
# Operations on the numeric stream

VALUE_LIMIT = 2.0**24  # float32 holds every integer up to here; a result beyond +-VALUE_LIMIT is invalid
SLOPE_LIMIT = 1.0  # partial derivatives are cut here: D steps then grow a gradient by at most 2^D


class Operation(NamedTuple):
    binary: bool  # whether it looks at b
    apply: Callable  # (a, b) -> result; infinity or NaN where it has none
    slopes: Callable  # (a, b, result) -> d result / d a, d result / d b; tensors or numbers


def _power(a, b):
    # A mixture of equal whole numbers is whole only up to rounding, and (-2)^b exists at whole b alone: without
    # this a soft plan's power would come and go with the order of a sum, and cached decoding would differ.
    whole = b.round()
    return torch.pow(a, torch.where((a < 0) & ((b - whole).abs() < 2**-16), whole, b))


OPERATIONS = {
    "add": Operation(True, torch.add, lambda a, b, result: (1.0, 1.0)),
    "subtract": Operation(True, torch.sub, lambda a, b, result: (1.0, -1.0)),
    "multiply": Operation(True, torch.mul, lambda a, b, result: (b, a)),
    "divide": Operation(True, torch.div, lambda a, b, result: (1 / b, -result / b)),
    "identity": Operation(False, lambda a, b: a, lambda a, b, result: (1.0, 0.0)),
    "power": Operation(True, _power, lambda a, b, result: (b * _power(a, b - 1), result * torch.log(a))),
    "log": Operation(False, lambda a, b: torch.log(a), lambda a, b, result: (1 / a, 0.0)),
    "max": Operation(True, torch.maximum, lambda a, b, result: (a >= b, a < b)),
    "min": Operation(True, torch.minimum, lambda a, b, result: (a <= b, a > b)),
}


def operation_names(dag_ops: str) -> list[str]:
    """The operations named by a config's `dag_ops`, in its order; raises ValueError for an unknown one."""
    names = list(OPERATIONS) if dag_ops == "all" else [name.strip() for name in dag_ops.split(",")]
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"dag_ops names {name!r}; choose from {', '.join(OPERATIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"dag_ops={dag_ops} names an operation twice")
    return names


def apply_operations(names: list[str], a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every operation in `names` on operands a, b (B, T): results, 0 where invalid, and validity, (B, T, O) each.

    >>> apply_operations(["multiply", "divide"], torch.tensor([[6.0]]), torch.tensor([[0.0]]))
    (tensor([[[0., 0.]]]), tensor([[[ True, False]]]))
    """
    results = torch.stack([OPERATIONS[name].apply(a, b) for name in names], dim=-1)
    valid = results.abs() <= VALUE_LIMIT  # false for infinity and NaN: x/0, log of x <= 0, 0^-1, (-2)^0.5
    return results.masked_fill(~valid, 0.0), valid


def slopes(names: list[str], a: torch.Tensor, b: torch.Tensor, results: torch.Tensor) -> torch.Tensor:
    """Partial derivatives (2, B, T, O) by a and b, always finite, within +-SLOPE_LIMIT."""
    table = a.new_empty(2, *results.shape)
    for column, name in enumerate(names):
        for row, slope in zip(table, OPERATIONS[name].slopes(a, b, results[..., column])):
            row[..., column] = slope
    return table.nan_to_num_().clamp_(-SLOPE_LIMIT, SLOPE_LIMIT)


class Mix(torch.autograd.Function):
    """sum(weights * values) over the last axis; exact for one-hot weights on any device: no matrix product.

    The weights' gradient is asinh(values), not values. The order of the choices is kept, but one operation
    that happens to overflow into the millions no longer outshouts every other gradient in the model.
    """

    @staticmethod
    def forward(ctx, weights, values):
        ctx.save_for_backward(weights, values)
        return (weights * values).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        weights, values = ctx.saved_tensors
        grad = grad[..., None]
        grad_values = (grad * weights).sum_to_size(values.shape) if ctx.needs_input_grad[1] else None
        return grad * torch.asinh(values), grad_values


class Step(torch.autograd.Function):
    """One step of a DAG: all operations on a and b (B, T), mixed by `weights` (B, T, O), and their validity.

    Forward it is the operations' own result. Backward it has their slopes, cut at SLOPE_LIMIT and 0 where
    invalid, which keeps the gradient of a long chain of products finite; weights are treated as in Mix.
    """

    @staticmethod
    def forward(ctx, weights, a, b, names):
        results, valid = apply_operations(names, a, b)
        ctx.names = names
        ctx.save_for_backward(weights, a, b, results, valid)
        ctx.mark_non_differentiable(valid)
        return (weights * results).sum(-1), valid

    @staticmethod
    def backward(ctx, grad, _):
        weights, a, b, results, valid = ctx.saved_tensors
        slope_a, slope_b = (slopes(ctx.names, a, b, results) * (weights * valid)).sum(-1)
        return grad[..., None] * torch.asinh(results), grad * slope_a, grad * slope_b, None


# ----------------------------------------------------------------------------------------------------
# Plans: from logits to choices


def soft(logits: torch.Tensor) -> torch.Tensor:
    """Choices (..., N) as a mixture: the softmax of the logits."""
    return F.softmax(logits, dim=-1)


class OneHot(torch.autograd.Function):
    """The largest logit's choice, exactly one-hot; backward, the gradient of the softmax."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)

    @staticmethod
    def backward(ctx, grad):
        probability = F.softmax(ctx.saved_tensors[0], dim=-1)
        weighted = probability * grad
        return torch.addcmul(weighted, probability, weighted.sum(-1, keepdim=True), value=-1)


def straight_through(logits: torch.Tensor) -> torch.Tensor:
    """Choices (..., N) as exactly one-hot, with the softmax's gradient (Bengio et al. 2013, 1308.3432)."""
    return OneHot.apply(logits)


PLANS = {"soft": soft, "straight_through": straight_through}


class Plan(NamedTuple):
    operands: torch.Tensor  # (B, T, D, 2, S), in [0, 1], sums to 1 over the slots visible at each step
    operation: torch.Tensor  # (B, T, D, O), in [0, 1], sums to 1

    @property
    def operand1(self) -> torch.Tensor:  # (B, T, D, S)
        return self.operands[:, :, :, 0]

    @property
    def operand2(self) -> torch.Tensor:  # (B, T, D, S)
        return self.operands[:, :, :, 1]


class DAGState(NamedTuple):
    """What the DAG did at every position; for tests, logs and pictures."""

    plan: Plan
    values: torch.Tensor  # (B, T, S), within +-VALUE_LIMIT
    validity: torch.Tensor  # (B, T, S), in [0, 1]: the probability that the slot holds a value
    gate: torch.Tensor  # (B, T, 1), in (0, 1), or exactly 1 where the config has no gate
    folded: torch.Tensor  # (B, T, C), the result as a vector, before the gate


# ----------------------------------------------------------------------------------------------------
# Contexts: the hidden states that values, operands and operations are read from


class LinearContexts(nn.Module):
    """All three are the trunk's hidden state itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()

    def forward(self, hidden: torch.Tensor, cache: Cache | None):
        return hidden, hidden, hidden


class AttentionContexts(nn.Module):
    """A snap block and token attention before the values, an attention block for each kind of choice."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.snap_block = Block(config)
        self.token_attention = CausalSelfAttention(config)
        self.operand_attention = CausalSelfAttention(config)
        self.operation_attention = CausalSelfAttention(config)

    def forward(self, hidden: torch.Tensor, cache: Cache | None):
        value_context = self.token_attention(self.snap_block(hidden, cache), cache)
        return value_context, self.operand_attention(hidden, cache), self.operation_attention(hidden, cache)


CONTEXTS = {"linear": LinearContexts, "attention": AttentionContexts}


# ----------------------------------------------------------------------------------------------------
# Values and inputs: which numbers a position can compute with


class LearnedValues(nn.Module):
    """A number for every token, extracted from its context and snapped to an integer.

    (B, T, C) -> (B, T), float32. Rounding passes its gradient straight through: without that the extractor
    would never learn.
    """

    scale = 10.0  # a unit of the linear map: a fresh model's values already spread over several integers

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.extract = nn.Linear(config.n_embd, 1)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        value = self.scale * self.extract(context.float()).squeeze(-1)
        return value + (value.round() - value).detach()


VALUES = {"learned": LearnedValues}


class Inputs(NamedTuple):
    values: torch.Tensor  # (B, T, K) or (B, 1, K) where all positions share the slots, float32
    visible: torch.Tensor  # (B, T, K) or (1, T, K), bool, at least one a position
    logits: torch.Tensor  # (B, T, D, 2, K), how much each step wants each input as operand 1 and 2


class TokenInputs(nn.Module):
    """K = 1: the token's own value and nothing of any other token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.depth = config.dag_depth
        self.score = nn.Linear(config.n_embd, config.dag_depth * 2)

    def forward(self, hidden, context, values, cache) -> Inputs:
        B, T = values.shape
        logits = self.score(context).view(B, T, self.depth, 2, 1)
        return Inputs(values[..., None], values.new_ones(1, T, 1, dtype=torch.bool), logits)


class SequenceInputs(nn.Module):
    """K = T: a value for every position up to and including this one, chosen by attention."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.depth, self.key_size = config.dag_depth, config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.dag_depth * 2 * self.key_size)
        self.key = nn.Linear(config.n_embd, self.key_size)

    def forward(self, hidden, context, values, cache) -> Inputs:
        B, T, _ = hidden.shape
        key = self.key(hidden)  # (B, K, C/H)
        visible = torch.ones(T, T, dtype=torch.bool, device=hidden.device).tril()[None]
        if cache is not None:
            key, values = cache.extend(self, "key", key), cache.extend(self, "values", values)
            visible = cache.visible
        query = self.query(context).view(B, T * self.depth * 2, self.key_size) / math.sqrt(self.key_size)
        logits = query @ key.transpose(1, 2)
        return Inputs(values[:, None], visible, logits.view(B, T, self.depth, 2, -1))


INPUTS = {"token": TokenInputs, "sequence": SequenceInputs}


# ----------------------------------------------------------------------------------------------------
# The DAG


class DAGPlanPredictor(nn.Module):
    """Chooses, for every position and step, two operands among the slots it can see, and an operation.

    Step s sees the visible inputs and the results of steps 0..s-1, that is slots 0..K+s-1.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.depth = config.dag_depth
        self.num_operations = len(operation_names(config.dag_ops))
        self.choose = PLANS[config.dag_plan]
        self.result_score = nn.Linear(config.n_embd, config.dag_depth * 2 * config.dag_depth)
        self.operation_score = nn.Linear(config.n_embd, config.dag_depth * self.num_operations)

    def forward(self, inputs: Inputs, operand_context: torch.Tensor, operation_context: torch.Tensor) -> Plan:
        """Inputs and contexts (B, T, C) -> Plan: operands (B, T, D, 2, S), operations (B, T, D, O)."""
        B, T, _ = operand_context.shape
        D = self.depth
        result_logits = self.result_score(operand_context).view(B, T, D, 2, D)
        logits = torch.cat([inputs.logits, result_logits], dim=-1).float()  # (B, T, D, 2, S)
        earlier = torch.ones(D, D, dtype=torch.bool, device=logits.device).tril(-1)  # step s sees results < s
        visible = torch.cat(
            [
                inputs.visible[:, :, None].expand(-1, -1, D, -1),
                earlier.expand(inputs.visible.size(0), T, D, D),
            ],
            dim=-1,
        )
        operands = self.choose(logits.masked_fill_(~visible[:, :, :, None], -torch.inf))  # before the softmax
        operation_logits = self.operation_score(operation_context).view(B, T, D, self.num_operations)
        return Plan(operands, self.choose(operation_logits.float()))


def execute(plan: Plan, values: torch.Tensor, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the plan over the input values (B, T or 1, K); returns values and validity, float32 (B, T, S) each.

    With one-hot plans, 12 + 7*3 in two steps:

        values = [12, 7, 3]: step 0 multiplies slots 1 and 2 into slot 3, step 1 adds slots 0 and 3 into slot 4
        -> values [12, 7, 3, 21, 33], validity [1, 1, 1, 1, 1]
    """
    B, T, D, _, _ = plan.operands.shape
    K = values.size(-1)
    inside = values.abs() <= VALUE_LIMIT  # False for NaN too
    values = values.masked_fill(~inside, 0.0)
    validity = inside.float()

    # what every step takes from the inputs, for all steps at once: (B, T, D, 2)
    from_inputs, from_results = plan.operands.split([K, D], dim=-1)
    taken = Mix.apply(from_inputs, values[:, :, None, None])
    with torch.no_grad():
        taken_validity = (from_inputs * validity[:, :, None, None]).sum(-1)

    results = values.new_zeros(B, T, 1, 0)  # (B, T, 1, steps done)
    result_validity = results
    # unbound once: indexing inside the loop would make autograd fill a whole (B, T, D, 2, D) for every step
    steps = zip(*(part.unbind(2) for part in (taken, taken_validity, from_results, plan.operation)))
    for step, (operands, have, from_results, operation) in enumerate(steps):
        from_results = from_results[..., :step]  # (B, T, 2, step)
        a, b = (operands + Mix.apply(from_results, results)).unbind(-1)  # (B, T)
        result, applicable = Step.apply(operation, a, b, names)
        with torch.no_grad():
            have = have + (from_results * result_validity).sum(-1)
            have_a, have_b = have.unbind(-1)  # (B, T)
            needed = [have_a * have_b if OPERATIONS[name].binary else have_a for name in names]
            valid = (operation * applicable * torch.stack(needed, dim=-1)).sum(-1)
            valid = valid.clamp(max=1.0)  # rounding errors above 1 would double with every step
        results = torch.cat([results, result.masked_fill(valid == 0, 0.0)[..., None, None]], dim=-1)
        result_validity = torch.cat([result_validity, valid[..., None, None]], dim=-1)
    return (
        torch.cat([values.expand(B, T, K), results.squeeze(2)], dim=-1),
        torch.cat([validity.expand(B, T, K), result_validity.squeeze(2)], dim=-1),
    )


class ValueFold(nn.Module):
    """The final value as a vector: projected, normalised, times a learned scale.

    The projection reads asinh(value): linear near 0, logarithmic far out, and its gradient fades as the
    value grows, so a huge value can neither drown the hidden state nor blow up the gradient.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.project = nn.Linear(1, config.n_embd)
        self.post_block = Block(config) if config.dag_post_block else None
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dag_scale = nn.Parameter(torch.empty(()))

    def forward(self, value: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """(B, T) -> (B, T, C)"""
        with torch.autocast(value.device.type, enabled=False):  # bf16 would merge 1000 numbers into 143
            dag_hidden = self.project(torch.asinh(value)[..., None])
        if self.post_block is not None:
            dag_hidden = self.post_block(dag_hidden, cache)
        return self.norm(dag_hidden) * self.dag_scale


FOLDS = {"value": ValueFold}


class DifferentiableDAG(nn.Module):
    """The numeric stream beside the hidden states: values -> plan -> execute -> fold. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.names = operation_names(config.dag_ops)
        self.contexts = CONTEXTS[config.dag_context](config)
        self.values = VALUES[config.dag_values](config)
        self.inputs = INPUTS[config.dag_inputs](config)
        self.planner = DAGPlanPredictor(config)
        self.fold = FOLDS[config.dag_fold](config)
        self.gate = nn.Linear(config.n_embd + 1, 1) if config.dag_gate else None

    def forward(self, hidden: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, DAGState]:
        """Hidden states (B, T, C) -> the same with the DAG's result mixed in, and what the DAG did."""
        value_context, operand_context, operation_context = self.contexts(hidden, cache)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would lose digits
            values = self.values(value_context)
        inputs = self.inputs(hidden, operand_context, values, cache)
        plan = self.planner(inputs, operand_context, operation_context)
        with torch.autocast(hidden.device.type, enabled=False):
            slots, validity = execute(plan, inputs.values, self.names)
        folded = self.fold(slots[..., -1], cache)
        gate = self._gate(hidden, validity[..., -1:])
        return hidden + gate * folded, DAGState(plan, slots, validity, gate, folded)

    def _gate(self, hidden: torch.Tensor, validity: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return torch.ones_like(validity)
        return torch.sigmoid(self.gate(torch.cat([hidden, validity.to(hidden.dtype)], dim=-1)))


# ----------------------------------------------------------------------------------------------------
# The language model


class GPT(nn.Module):
    """A GPT-2 trunk, the DAG on top of it when dag_depth > 0, and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        check(config)
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.dag = DifferentiableDAG(config) if config.dag_depth > 0 else None
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._init_weights()

    def _init_weights(self) -> None:
        """Every initial weight of the model. GPT-2's scheme; the DAG starts quiet, so it cannot hurt early on."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the residual stream sums 2 * n_layer of these
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))
            if name.endswith("dag_scale"):
                nn.init.constant_(parameter, 0.2)

    def hidden_states(
        self, idx: torch.Tensor, cache: Cache | None = None
    ) -> tuple[torch.Tensor, DAGState | None]:
        """Tokens (B, T) -> hidden states (B, T, C) as the head sees them, and the DAG's state (None without).

        With a cache, `idx` holds only the tokens after those the cache has; call `cache.commit()` afterwards.
        """
        if cache is None:
            T, limit = idx.size(1), self.config.block_size
            assert T <= limit, f"{T} tokens, block_size {limit}"
            positions = torch.arange(T, device=idx.device)
        else:
            positions = cache.begin(idx.size(1))
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x, cache)
        hidden = self.transformer.ln_f(x)
        return (hidden, None) if self.dag is None else self.dag(hidden, cache)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """Tokens (B, T) -> logits (B, T, vocab_size) and the mean cross-entropy in nats (None without targets).

        Targets (B, T) of -1 are ignored.
        """
        hidden, _ = self.hidden_states(idx)
        logits = self.lm_head(hidden)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def inspect(self, idx: torch.Tensor) -> DAGState | None:
        """What the DAG does at every position of `idx` (B, T), without gradient; None for a plain GPT."""
        return self.hidden_states(idx)[1]

    def num_parameters(self, embeddings: bool = True) -> int:
        """Trainable scalars; without position embeddings where `embeddings` is False, as nanoGPT counts."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total if embeddings else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self) -> float:
        """Forward and backward: 6 N for all weights, 12 L C T for the trunk's attention (PaLM, 2204.02311, B)."""
        c = self.config
        return 6 * self.num_parameters(embeddings=False) + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context, say to fine-tune GPT-2's 1024 positions at 256."""
        if block_size > self.config.block_size:
            raise ValueError(
                f"block_size {block_size} is beyond the {self.config.block_size} positions these weights were "
                f"trained with; use --block_size={self.config.block_size} or less"
            )
        self.config = replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size])

    @classmethod
    def from_huggingface(cls, source, **overrides) -> "GPT":
        """GPT-2's weights, from a `transformers` model or by name ("gpt2", "gpt2-medium", ...; downloads).

        `overrides` are GPTConfig fields that do not change the trunk's shape: dropout and the dag_* settings.
        """
        if isinstance(source, str):
            try:
                from transformers import GPT2LMHeadModel
            except ImportError:
                raise ValueError(f"{source} needs Hugging Face's package: pip install transformers") from None
            source = GPT2LMHeadModel.from_pretrained(source)
        theirs = source.config
        model = cls(
            GPTConfig(
                block_size=theirs.n_positions,
                vocab_size=theirs.vocab_size,
                n_layer=theirs.n_layer,
                n_head=theirs.n_head,
                n_embd=theirs.n_embd,
                bias=True,
                **overrides,
            )
        )
        trunk = model.state_dict()
        for name, tensor in source.state_dict().items():
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # their causal mask
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.t()  # their Conv1D stores (in, out)
            trunk[name] = tensor
        model.load_state_dict(trunk)
        return model


def check(config: GPTConfig) -> None:
    """Raises ValueError, with the legal values, for a config that no model can be built from."""
    for field in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} is {getattr(config, field)}; it must be at least 1")
    if config.dag_depth < 0:
        raise ValueError(f"dag_depth is {config.dag_depth}; it must be at least 0, the plain GPT")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}")
    registries = dict(
        dag_inputs=INPUTS, dag_values=VALUES, dag_plan=PLANS, dag_fold=FOLDS, dag_context=CONTEXTS
    )
    for field, registry in registries.items():
        if getattr(config, field) not in registry:
            raise ValueError(f"{field} is {getattr(config, field)!r}; choose from {', '.join(registry)}")
    operation_names(config.dag_ops)
