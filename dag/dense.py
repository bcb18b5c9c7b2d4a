"""The numeric stream as mixtures and hard choices of float32 values, differentiable from end to end.

    hidden -> values -> plan -> execute -> fold -> hidden

Here a number is what a learned extractor makes of a hidden state, at every position of the text, and plans learn by
gradient alone. config/train_seed000.py and config/train_seed001.py are such systems; they are the baselines of the
DAG over the text's own numbers in dag_model.py.

- an append-only list of S = K + D slots a position: K inputs, then one result a step. Nothing is ever overwritten
- visibility is masked before the softmax, so the visible operands always carry all of the probability
- an operation that has no value there (x/0, log of x <= 0, a result out of range) makes its slot invalid
- finite values and gradients at any depth; deterministic in eval; causal at every position

Legend: B batch, T tokens, C width, K inputs, D steps, S = K + D slots, O operations, P positions in a cache.
"""

import math
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt.attention import CausalSelfAttention
from gpt.block import Block
from gpt.kv_cache import KVCache
from gpt.model_config import operation_names

# ----------------------------------------------------------------------------------------------------
# Operations on the numeric stream

VALUE_LIMIT = 2.0**24  # float32 holds every integer up to here; a result beyond +-VALUE_LIMIT is invalid
LIMITS = {torch.float32: VALUE_LIMIT, torch.float64: 2.0**53}
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


def apply_operations(names: list[str], a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every operation in `names` on operands a, b (B, T): results, 0 where invalid, and validity, (B, T, O) each.

    >>> apply_operations(["multiply", "divide"], torch.tensor([[6.0]]), torch.tensor([[0.0]]))
    (tensor([[[0., 0.]]]), tensor([[[ True, False]]]))
    """
    results = torch.stack([OPERATIONS[name].apply(a, b) for name in names], dim=-1)
    valid = (
        results.abs() <= LIMITS[results.dtype]
    )  # false for infinity and NaN: x/0, log of x <= 0, 0^-1, (-2)^0.5
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


class DenseState(NamedTuple):
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

    def __init__(self, config):
        super().__init__()

    def forward(self, hidden: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None):
        return hidden, hidden, hidden


class AttentionContexts(nn.Module):
    """A snap block and token attention before the values, an attention block for each kind of choice."""

    def __init__(self, config):
        super().__init__()
        self.snap_block = Block(config)
        self.token_attention = CausalSelfAttention(config)
        self.operand_attention = CausalSelfAttention(config)
        self.operation_attention = CausalSelfAttention(config)

    def forward(self, hidden: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None):
        value_context = self.token_attention(self.snap_block(hidden, cache, mask), cache, mask)
        operand_context = self.operand_attention(hidden, cache, mask)
        return value_context, operand_context, self.operation_attention(hidden, cache, mask)


CONTEXTS = {"linear": LinearContexts, "attention": AttentionContexts}


# ----------------------------------------------------------------------------------------------------
# Values and inputs: which numbers a position can compute with


class LearnedValues(nn.Module):
    """A number for every token, extracted from its context and snapped to an integer.

    (B, T, C) -> (B, T), float32. Rounding passes its gradient straight through: without that the extractor
    would never learn.
    """

    scale = 10.0  # a unit of the linear map: a fresh model's values already spread over several integers

    def __init__(self, config):
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

    def __init__(self, config):
        super().__init__()
        self.depth = config.dag_depth
        self.score = nn.Linear(config.n_embd, config.dag_depth * 2)

    def forward(self, hidden, context, values, cache, mask) -> Inputs:
        B, T = values.shape
        logits = self.score(context).view(B, T, self.depth, 2, 1)
        return Inputs(values[..., None], values.new_ones(1, T, 1, dtype=torch.bool), logits)


class SequenceInputs(nn.Module):
    """K = T: a value for every position up to and including this one, chosen by attention."""

    def __init__(self, config):
        super().__init__()
        self.depth, self.key_size = config.dag_depth, config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.dag_depth * 2 * self.key_size)
        self.key = nn.Linear(config.n_embd, self.key_size)

    def forward(self, hidden, context, values, cache, mask) -> Inputs:
        B, T, _ = hidden.shape
        key = self.key(hidden)  # (B, K, C/H)
        visible = torch.ones(T, T, dtype=torch.bool, device=hidden.device).tril()[None]
        if cache is not None:
            key, values = cache.update(self, "key", key), cache.update(self, "values", values)
            visible = cache.visible
        if mask is not None:
            visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        query = self.query(context).view(B, T * self.depth * 2, self.key_size) / math.sqrt(self.key_size)
        logits = query @ key.transpose(1, 2)
        return Inputs(values[:, None], visible, logits.view(B, T, self.depth, 2, -1))


INPUTS = {"token": TokenInputs, "sequence": SequenceInputs}


# ----------------------------------------------------------------------------------------------------
# The DAG


class DensePlanPredictor(nn.Module):
    """Chooses, for every position and step, two operands among the slots it can see, and an operation.

    Step s sees the visible inputs and the results of steps 0..s-1, that is slots 0..K+s-1.
    """

    def __init__(self, config):
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
    inside = values.abs() <= LIMITS[values.dtype]  # False for NaN too
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

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(1, config.n_embd)
        self.post_block = Block(config) if config.dag_post_block else None
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dag_scale = nn.Parameter(torch.empty(()))

    def forward(self, value: torch.Tensor, cache: KVCache | None, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, T) -> (B, T, C)"""
        with torch.autocast(value.device.type, enabled=False):  # bf16 would merge 1000 numbers into 143
            dag_hidden = self.project(torch.asinh(value)[..., None])
        if self.post_block is not None:
            dag_hidden = self.post_block(dag_hidden, cache, mask)
        return self.norm(dag_hidden) * self.dag_scale


FOLDS = {"value": ValueFold}


class DenseDAG(nn.Module):
    """The numeric stream beside the hidden states: values -> plan -> execute -> fold. (B, T, C) -> (B, T, C)."""

    initial_scale = 0.2  # of dag_scale: it starts quiet, so it cannot hurt early on

    def __init__(self, config, vocabulary=None):
        super().__init__()
        self.names = operation_names(config.dag_ops)
        self.contexts = CONTEXTS[config.dag_context](config)
        self.values = VALUES[config.dag_values](config)
        self.inputs = INPUTS[config.dag_inputs](config)
        self.planner = DensePlanPredictor(config)
        self.fold = FOLDS[config.dag_fold](config)
        self.gate = nn.Linear(config.n_embd + 1, 1) if config.dag_gate else None

    def forward(
        self, hidden: torch.Tensor, cache: KVCache | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, DenseState]:
        """Hidden states (B, T, C) -> the same with the DAG's result mixed in, and what the DAG did."""
        value_context, operand_context, operation_context = self.contexts(hidden, cache, mask)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would lose digits
            values = self.values(value_context)
        inputs = self.inputs(hidden, operand_context, values, cache, mask)
        plan = self.planner(inputs, operand_context, operation_context)
        with torch.autocast(hidden.device.type, enabled=False):
            slots, validity = execute(plan, inputs.values, self.names)
        folded = self.fold(slots[..., -1], cache, mask)
        gate = self._gate(hidden, validity[..., -1:])
        return hidden + gate * folded, DenseState(plan, slots, validity, gate, folded)

    def _gate(self, hidden: torch.Tensor, validity: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return torch.ones_like(validity)
        return torch.sigmoid(self.gate(torch.cat([hidden, validity.to(hidden.dtype)], dim=-1)))
