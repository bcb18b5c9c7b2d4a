"""A GPT with a differentiable DAG: read this file first.

After the transformer's last LayerNorm the model may plan a short computation over the numbers it has read, run it
exactly, and offer the result's digits to its language-model head, under a learned gate. With dag_depth=0 the same
class is the plain GPT, and the baseline.

    12 + 7 * 3 =          numbers 3, 7, 12 (the newest first) stand in slots 0, 1, 2
                          plan: multiply slots 0 and 1 into slot K; add slots 2 and K into slot K + 1; an integer
                          offered while the number is written: "3", then "3", then that it is over

- trunk: GPT-2 (Radford et al. 2019) as nanoGPT shapes it; loads Hugging Face's weights
- numbers are read from the digits (dag/number_lexer.py), results are exact at any length (dag/exact_arithmetic.py)
- one plan a number, made at the position before it, held while the text follows what it offers (dag/proposals.py)
- operations, operands and format are chosen by the hidden state, step by step, each seeing the choices before
  (dag/planner.py)
- learned from plain text: a plan whose written result is the number that follows in the text explains it, and the
  planner's loss is minus the log-probability of all such plans found (dag/plan_loss.py). No labels, and no gradient
  through values
- causal at every position; deterministic in eval

Other systems under the same trunk, chosen by dag_inputs: dag/dense.py.

Legend: B batch, T tokens, C width, K inputs, D steps, S = K + D slots, O operations, F formats, N plans made,
P positions in a cache.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dag import dense, exact_arithmetic, positions
from dag.dense import DenseDAG, DenseState
from dag.number_lexer import Lexer, Numerals
from dag.plan_loss import PlanLoss, target_at
from dag.plan_search import Plans
from dag.planner import DAGPlanPredictor, LearnedNumbers, MixedPlanPredictor, Sight, as_choices, result_of
from dag.positions import DigitView, Row
from dag.proposals import NOTHING, Offers, digit_weights, spell, spread
from gpt.block import Block
from gpt.kv_cache import KVCache
from gpt.model_config import GPTConfig, operation_names

# ----------------------------------------------------------------------------------------------------
# The DAG


class DAGState(NamedTuple):
    """What the DAG did, for tests, logs and pictures. N plans, in the order of rows and positions."""

    row: torch.Tensor  # (N,)
    position: torch.Tensor  # (N,), the one before the number
    plans: Plans  # (N, D) each
    format: torch.Tensor  # (N,), index into exact.FORMATS
    log_probability: torch.Tensor  # (N,), of plan and format
    written: list[str | None]  # N results, None where the plan has none
    symbols: list[list[int]]  # the same as tokens, see readout.spell
    offers: Offers  # (B, T) each
    gate: torch.Tensor  # (B, T, 1), in [0, 1): 0 where nothing is offered
    plan_loss: torch.Tensor | None  # (), in nats, in training only
    sight: Sight  # what the N plans were made from
    result: torch.Tensor | None  # (N,) float64 with a gradient, where something learns from it
    folded: torch.Tensor  # (M, C), what is offered at M positions as vectors, before the gate


def to_list(tensor: torch.Tensor) -> list:
    """tensor.tolist(), ten times as fast. The host waits for the device."""
    return tensor.cpu().numpy().tolist()


class Made(NamedTuple):
    """N plans and what came of them."""

    plans: Plans  # (N, D) each
    format: torch.Tensor  # (N,), index into exact.FORMATS
    log_probability: torch.Tensor  # (N,), of plan and format
    written: list[str | None]  # N results, None where there is none
    result: torch.Tensor | None  # (N,) float64 with a gradient, where something learns from it


class DifferentiableDAG(nn.Module):
    """The numeric stream: numbers -> plan -> exact result -> offered digits -> hidden states."""

    initial_scale = 10.0  # of dag_scale: what an open gate lets through is what the head says

    def __init__(self, config: GPTConfig, vocabulary: list[bytes]):
        super().__init__()
        if vocabulary is None:
            raise ValueError(
                "a DAG over numbers has to know the text of every token: GPT(config, tokenizer.vocabulary)"
            )
        self.names = operation_names(config.dag_ops)
        self.operations = [exact_arithmetic.OPERATIONS[name] for name in self.names]
        self.digits, self.over = config.dag_digits, config.vocab_size
        self.separator_id = config.separator_id
        self.min_gate_to_plan = config.dag_min_gate_to_plan
        self.min_gate_to_train = config.dag_min_gate_to_train
        self.min_search_probability = config.dag_min_search_probability
        self.lexer = Lexer(vocabulary, config.separator_id, config.dag_num_inputs, config.dag_thousands)
        self.near_digit = nn.Embedding(
            config.dag_full_digits + 1, config.n_embd
        )  # how far into a number a token is
        self.mixes = config.dag_plan in dense.PLANS
        self.planner = (MixedPlanPredictor if self.mixes else DAGPlanPredictor)(config, self.names)
        self.learned_numbers = LearnedNumbers(config) if config.dag_values == "learned" else None
        self.plan_loss = PlanLoss(config, self.names)
        self.wanted = nn.Linear(config.n_embd, 1)  # does a computed number belong here?
        self.trusted = nn.Linear(3, 1)  # how likely is the plan, and how far has its number come?
        self.over_vector = nn.Parameter(torch.empty(config.n_embd))
        self.dag_scale = nn.Parameter(torch.empty(()))

    @torch.compiler.disable  # as many plans as the text has numbers: their shapes never repeat
    def forward(
        self, hidden, idx, numerals: Numerals, embedding, targets=None
    ) -> tuple[torch.Tensor, DAGState]:
        """Hidden states (B, T, C) of tokens (B, T), with the offers in their place as far as the gate is open; and what
        was done. `embedding` (V, C) holds the tokens' vectors as the head has them, targets (B, T) are for the loss.
        """
        wanted = self.wanted(hidden).float().squeeze(-1)  # (B, T) logits
        open_ = torch.sigmoid(wanted.detach())
        bars = positions.fraction_bars(self.lexer, idx, numerals)
        here, following = positions.may_compute(self.lexer, idx, numerals), None
        if not self.training:
            here = here & (open_ > self.min_gate_to_plan)
        elif targets is not None:
            following = positions.following(self.lexer, idx, targets, self.separator_id)
            here = here & (following.opens | (open_ > self.min_gate_to_train))
        at = row, position = here.nonzero(as_tuple=True)  # the host waits for the device
        sight = self.look(hidden, numerals, at)
        made = self.make(sight, lambda: self.read(numerals, idx, at))
        signs = to_list(numerals.sign[at])
        symbols = [
            spell(text, sign, self.lexer.char_ids, self.over) for text, sign in zip(made.written, signs)
        ]
        offers = spread(
            symbols, row, position, made.log_probability.detach(), idx, (numerals.offset > 0) | bars
        )
        plan_loss = None
        if following is not None and not self.mixes:
            n = following.opens[at].nonzero().squeeze(1)  # those of the N plans that stand before a number
            at = row[n], position[n]
            odds = (2 * open_[at]).clamp(min=self.min_search_probability)
            plan_loss = self.plan_loss(self.planner, made.plans[n], sight[n], target_at(following, at), odds)
        at = (offers.symbol != NOTHING).nonzero(as_tuple=True)  # M positions; the host waits for the device
        plan, symbol, k = offers.plan[at], offers.symbol[at], offers.written[at]
        gate = self.gate(wanted[row, position][plan], made.log_probability.detach()[plan], symbol, k)  # (M,)
        vectors = self.vectors(symbol, embedding)  # (M, C)
        if made.result is not None:
            vectors = vectors + self.drift(made, symbols, plan, symbol, k, embedding)
        mixed = hidden.index_put(at, hidden[at].lerp(vectors, gate[:, None]))
        gate = torch.zeros_like(open_).index_put(at, gate)[..., None]
        done = (made.plans, made.format, made.log_probability, made.written, symbols, offers, gate)
        return mixed, DAGState(row, position, *done, plan_loss, sight, made.result, vectors)

    def look(self, hidden, numerals: Numerals, at) -> Sight:
        row, position = at
        inputs, seen = numerals.visible[at], numerals.seen[at]
        most = int(inputs.sum(-1).max()) if len(row) else 0  # of the K; the host waits for the device
        tokens, first = hidden.flatten(0, 1), row * hidden.size(1)  # index_select has the faster backward
        readers = tokens.index_select(0, (first[:, None] + seen[:, :most]).flatten())
        readers = readers.view(len(row), most, hidden.size(-1))
        here = tokens.index_select(0, first + position)
        return Sight(here, readers, inputs, self.value(readers, numerals.value[at], inputs))

    def value(self, readers, literal, inputs) -> torch.Tensor:
        """What the numbers are worth (N, K): what their digits say, or what is learned to be read from them."""
        if self.learned_numbers is not None:
            literal = F.pad(self.learned_numbers(readers), (0, literal.size(1) - readers.size(1)))
        return literal.masked_fill(~inputs, torch.nan)

    def make(self, sight: Sight, read) -> Made:
        """Plans, and what they give; `read()` says what the numbers are, exactly."""
        if self.mixes:
            context, keys = self.planner.read(sight.hidden, sight.readers)
            result, plans, log_p = self.planner(context, keys, sight.inputs, sight.values)
            format = torch.full_like(plans.operation[:, 0], self.planner.format)
            written = [
                self.write(exact_arithmetic.from_float(value), self.planner.format)
                for value in to_list(result.detach())
            ]
            return Made(plans, format, log_p, written, result)
        with torch.no_grad():
            plans, log_p, formats = self.planner(
                *self.planner.read(sight.hidden, sight.readers), sight.inputs
            )
            format_log_p, format = formats.max(-1)
        if self.learned_numbers is None:
            numbers, result = read(), None
        else:
            numbers = [
                [exact_arithmetic.from_float(value) for value in row]
                for row in to_list(sight.values.detach())
            ]
            choices = as_choices(plans, self.planner.num_slots, len(self.names))
            result = result_of(choices, sight.values, self.names)
        return Made(plans, format, log_p + format_log_p, self.run(plans, format, numbers), result)

    def read(self, numerals: Numerals, idx, at) -> list[list[exact_arithmetic.Rational | None]]:
        """The K numbers that each of the N plans can see, exactly, on the host."""
        columns = [to_list(column[at]) for column in (numerals.mantissa, numerals.places, numerals.fits)]
        counts, rows = to_list(numerals.visible[at].sum(-1)), to_list(at[0])
        tokens = spans = None
        numbers = []
        for n, (mantissa, places, fits) in enumerate(zip(*columns)):
            for k in range(counts[n]):
                if not fits[k]:  # too long for an integer tensor
                    tokens = tokens or to_list(idx)
                    spans = spans or to_list(torch.stack([numerals.first[at], numerals.last[at]], dim=-1))
                    mantissa[k], places[k] = self.lexer.read_number(tokens[rows[n]], *spans[n][k])
            numbers.append(
                [exact_arithmetic.from_decimal(*number) for number in zip(mantissa[: counts[n]], places)]
            )
            numbers[-1] += [None] * (self.planner.num_inputs - counts[n])
        return numbers

    def run(self, plans: Plans, format: torch.Tensor, numbers: list) -> list[str | None]:
        """The written results of N plans over their numbers, None where there is none."""
        depth, written = self.planner.depth, []
        lengths = to_list((plans.operation != self.planner.end).sum(1).clamp(max=depth - 1) + 1)
        steps = to_list(torch.stack(tuple(plans), dim=-1).flatten(0, 1))  # N * depth triples
        for n, (length, form, inputs) in enumerate(zip(lengths, to_list(format), numbers)):
            first = n * depth
            result = exact_arithmetic.run(
                steps[first : first + length], inputs, self.digits, self.operations
            )[-1]
            written.append(self.write(result, form))
        return written

    def write(self, result: exact_arithmetic.Rational | None, format: int) -> str | None:
        return None if result is None else exact_arithmetic.write(result, format, self.digits)

    def step(self, hidden, rows: list[Row], embedding) -> torch.Tensor:
        """What forward does, for the newest token of every row: hidden states (B, 1, C) -> (B, 1, C)."""
        for r, row in enumerate(rows):
            if row.reader.completed:
                row.readers.appendleft(hidden[r, 0])
        candidates = [r for r, row in enumerate(rows) if row.may_compute]
        if candidates:
            wanted = self.wanted(hidden[:, 0]).float().squeeze(1)  # (B,)
            open_ = torch.sigmoid(wanted).tolist()  # the host waits for the device
            opened = [r for r in candidates if open_[r] > self.min_gate_to_plan]
            if opened:
                at = torch.tensor(opened, device=hidden.device)
                known = hidden[:, 0].index_select(0, at), wanted.index_select(0, at)
                self._plan_rows([rows[r] for r in opened], *known, embedding)
        if not any(row.offer for row in rows):
            return hidden
        offering = [r for r, row in enumerate(rows) if row.offer]
        gates, vectors = (torch.stack(part) for part in zip(*(rows[r].offer[0][1:] for r in offering)))
        at = torch.tensor(offering, device=hidden.device)
        mixed = hidden.index_select(0, at).lerp(vectors[:, None], gates[:, None, None])
        return hidden.index_copy(0, at, mixed)  # a copy: the rows remember hidden states as they were

    def _plan_rows(self, rows: list[Row], hidden, wanted, embedding) -> None:
        """Plans for rows with hidden states (N, C) and gate logits `wanted` (N,), which offer them from now on."""
        K, counts = self.planner.num_inputs, [len(row.readers) for row in rows]
        readers = pad_sequence([torch.stack(tuple(row.readers)) for row in rows], batch_first=True)
        inputs = torch.tensor([[k < count for k in range(K)] for count in counts], device=hidden.device)
        numbers = [[exact_arithmetic.from_decimal(*number) for number in row.reader.numbers] for row in rows]
        numbers = [known + [None] * (K - len(known)) for known in numbers]
        values = [[x[0] / x[1] if x else 0.0 for x in known] for known in numbers] if self.mixes else 0.0
        values = torch.tensor(values, dtype=torch.float64, device=hidden.device).expand(len(rows), K)
        made = self.make(Sight(hidden, readers, inputs, self.value(readers, values, inputs)), lambda: numbers)
        signs = [row.reader.sign for row in rows]
        symbols = [
            spell(text, sign, self.lexer.char_ids, self.over) for text, sign in zip(made.written, signs)
        ]
        self.offer(rows, symbols, wanted, made.log_probability, embedding)

    def offer(self, rows: list[Row], symbols, wanted, log_p, embedding, first: int = 0) -> None:
        """Rows get a plan's symbols from the `first` on, each with its gate and its vector; (N,) the others."""
        for row, tokens, *plan in zip(rows, symbols, wanted, log_p):
            symbol = torch.tensor(tokens[first:], dtype=torch.long, device=wanted.device)
            k = torch.arange(first, len(tokens), device=wanted.device)
            gate = self.gate(*(fact.expand(len(symbol)) for fact in plan), symbol, k)
            row.offer = list(zip(tokens[first:], gate, self.vectors(symbol, embedding)))

    def resume(self, rows: list[Row], hidden, state: DAGState, embedding) -> None:
        """Give rows that have read their prompts what they need to go on: who read the numbers, and what is offered."""
        for r, row in enumerate(rows):
            row.readers.extend(hidden[r, column] for column in row.seen)
            n = int(state.offers.plan[r, row.column])
            if n < len(state.symbols):
                position = int(state.position[n])
                wanted = self.wanted(hidden[r, position]).float()
                log_p, first = state.log_probability[n : n + 1], row.column - position
                self.offer([row], [state.symbols[n]], wanted, log_p, embedding, first)

    def gate(self, wanted, log_probability, symbol, written) -> torch.Tensor:
        """How open the gate is for M symbols, (M,) each, in (0, 1). It is decided with the plan: `wanted` is a logit of
        the position where that was made; what is added depends on how likely the plan is and how far its number has come.
        """
        over, begun = symbol == self.over, written > 0
        features = torch.stack([log_probability.clamp(min=-10), over.float(), begun.float()], dim=-1)
        return torch.sigmoid(wanted + self.trusted(features).float().squeeze(-1))

    def vectors(self, symbol, embedding) -> torch.Tensor:
        """M symbols as vectors of length dag_scale (M, C): the head's own for a token."""
        tokens = F.embedding(symbol.clamp(max=self.over - 1), embedding)
        vectors = self.over_vector.where((symbol == self.over)[:, None], tokens)
        return F.normalize(vectors, dim=-1) * self.dag_scale

    def drift(self, made: Made, symbols, plan, symbol, written, embedding) -> torch.Tensor:
        """Zero, with the gradient of M offered digits (M, C) by the results that they write."""
        ids = torch.tensor([self.lexer.char_ids[digit] for digit in "0123456789"], device=plan.device)
        digits = F.normalize(embedding[ids], dim=-1) * self.dag_scale
        slope = (digits.roll(-1, 0) - digits.roll(1, 0)) / 2  # of digit d towards d + 1, round the clock
        weight = digit_weights(made.written, symbols).to(plan.device)[plan, written]
        result = made.result.nan_to_num()
        moved = ((result - result.detach())[plan] * weight).to(slope.dtype)
        return moved[:, None] * slope[(symbol[:, None] == ids).long().argmax(-1)]


DAGS = {"numbers": DifferentiableDAG, "token": DenseDAG, "sequence": DenseDAG}

# ----------------------------------------------------------------------------------------------------
# The language model


class GPT(nn.Module):
    """A GPT-2 trunk, the DAG on top of it when dag_depth > 0, and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig, vocabulary: list[bytes] | None = None):
        super().__init__()
        config.check()
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
        self.dag = DAGS[config.dag_inputs](config, vocabulary) if config.dag_depth > 0 else None
        self.reads_numbers = isinstance(self.dag, DifferentiableDAG)
        self.digit_view = DigitView(config.dag_full_digits, config.dag_digit_decay)
        self.silent = False  # set it, and the trunk goes on without what the DAG has to say
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
                nn.init.constant_(parameter, self.dag.initial_scale)
            if name.endswith("over_vector"):
                nn.init.normal_(parameter, mean=0.0, std=0.02)

    def hidden_states(
        self, idx: torch.Tensor, cache: KVCache | None = None, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, DAGState | DenseState | None]:
        """Tokens (B, T) -> hidden states (B, T, C) as the head sees them, and the DAG's state (None without).

        An empty cache takes whole prompts, padded on the right; a cache in use one more token a row, (B, 1).
        Call `cache.commit()` afterwards. Targets are what follows each token, for the planner's loss.
        """
        assert idx.size(1) <= self.config.block_size, (
            f"{idx.size(1)} tokens, block_size {self.config.block_size}"
        )
        numerals = None
        if cache is not None:
            cache.begin(idx.size(1))
        if cache is not None and cache.longest > 0:
            layout = self._next_layout(idx, cache)
        else:
            numerals = self.dag.lexer(idx) if self.reads_numbers else None
            layout = positions.layout(idx, self.config.separator_id, numerals, self.digit_view)
        x = self.transformer.wte(idx) + self.transformer.wpe(layout.positions)
        if self.reads_numbers:
            x = x + self.dag.near_digit(layout.depth)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache, layout.mask)
        hidden = self.transformer.ln_f(x)
        mixed, state = hidden, None
        if self.reads_numbers:
            with torch.autocast(idx.device.type, enabled=False):  # matrices this small are faster in float32
                if numerals is None:
                    mixed = self.dag.step(hidden.float(), cache.rows, self.lm_head.weight)
                else:
                    mixed, state = self.dag(hidden.float(), idx, numerals, self.lm_head.weight, targets)
        elif self.dag is not None:
            mixed, state = self.dag(hidden, cache, layout.mask)
        if cache is not None and cache.longest == 0:
            cache.prompts = idx, hidden, state
        return hidden if self.silent else mixed, state

    def _next_layout(self, idx: torch.Tensor, cache: KVCache) -> positions.Layout:
        assert idx.size(1) == 1, f"{idx.size(1)} tokens a row for a cache in use: give one"
        if cache.rows is None:
            self._open_rows(cache)
        for row, token in zip(cache.rows, idx[:, 0].tolist()):  # the host waits for the device
            row.feed(token)
        return positions.next_layout(cache.rows, cache.bias[:, : cache.width])

    def _open_rows(self, cache: KVCache) -> None:
        """The state of decoding after the prompts."""
        idx, hidden, state = cache.prompts
        prompts = [tokens[:length] for tokens, length in zip(idx.tolist(), cache.lengths.tolist())]
        lexer = self.dag.lexer if self.reads_numbers else None
        cache.rows = [Row(self.config.separator_id, lexer, self.digit_view) for _ in prompts]
        cache.bias = positions.open_bias(cache.rows, prompts, cache.block_size, idx.device)
        if self.reads_numbers:
            self.dag.resume(cache.rows, hidden, state, self.lm_head.weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None):
        """Tokens (B, T) -> logits (B, T, vocab_size) and the loss in nats (None without targets): the mean
        cross-entropy, and in training the planner's loss on top.

        Targets (B, T) of -1 are ignored.
        """
        hidden, state = self.hidden_states(idx, targets=targets)
        logits = self.lm_head(hidden)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        if self.training and self.reads_numbers and state.plan_loss is not None:
            loss = loss + state.plan_loss
        return logits, loss

    @torch.no_grad()
    def inspect(self, idx: torch.Tensor) -> DAGState | DenseState | None:
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
    def from_huggingface(cls, source, vocabulary: list[bytes] | None = None, **overrides) -> "GPT":
        """GPT-2's weights, from a `transformers` model or by name ("gpt2", "gpt2-medium", ...; downloads).

        `vocabulary` holds the bytes of every token, for a DAG over numbers. `overrides` are GPTConfig fields that do
        not change the trunk's shape: dropout, separator_id and the dag_* settings.
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
            ),
            vocabulary,
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
