"""Which part of a model failed at a problem, and what it had planned; whether its gates were open.

    attempts = diagnose(model, tokenizer, solve(model, tokenizer, problems))
    attempts[0].part, attempts[0].plan          # "plan", "12 + (7 * 3 = 21) = 33"

What made an attempt fail is read from the plan that the DAG had for the first token that went wrong:

    context    the prompt, or as much of the answer as was right, is longer than the model's context
    reading    the DAG does not see all numbers of the prompt: there are more than it has inputs, or one that
               the lexer does not read as it is meant; or there are none, or none may open after the prompt
    plan       another value was computed
    execution  the plan has no value, or none that can be written with dag_digits
    writing    the right value in another format; or the right text, through an open gate, was overruled
    gate       the right text, but the gate was shut; or no plan, as the gate would have been shut
    model      there is no DAG over the numbers of the text

A plan that came out right is right, whatever it was made from: an unread number is then held against nobody.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dag import exact_arithmetic, positions
from dag.number_lexer import Lexer, Reader
from dag_model import GPT, DAGState, DenseState, DifferentiableDAG
from data.tokenizer import Tokenizer
from evals.answers import Attempt, Problem, encode, in_batches, to_number
from inference.explain import plan_text, steps_of
from inference.token_stats import has_gate

OPEN = 0.5  # a gate above this is open
SPELLED = re.compile(  # as a person reads it; but max(12,345) is of two
    r"(((?<![,(])\d{1,3}(,\d{3})+(?!\d)|\d+)(\.\d+)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE
)


# ------------------------------------------------------------------------------------------------------------
# gates


def gates_at_answers(
    model: GPT, tokenizer: Tokenizer, problems: list[Problem], batch_size: int = 64
) -> list[bool]:
    """For every problem, whether the gate is open at the position before the answer's number, or before its
    first token where it has none. What was written up to there is the file's. [] for a model without gate."""
    flags = []
    for ends, is_open, opens, _ in read_lines(model, tokenizer, problems, batch_size):
        for last, gates, before_number in zip(ends, is_open.tolist(), opens.tolist()):
            at = before_number.index(True, last) if True in before_number[last:] else last
            flags.append(at < len(gates) and gates[at])  # beyond the context there is none
    return flags


def gates_at_numbers(
    model: GPT, tokenizer: Tokenizer, problems: list[Problem], batch_size: int = 64
) -> list[bool]:
    """The same for every number, of prompts and answers, that could be computed from others in its line."""
    flags = []
    for _, is_open, opens, computes in read_lines(model, tokenizer, problems, batch_size):
        flags += is_open[opens & computes].tolist()
    return flags


def read_lines(
    model: GPT, tokenizer: Tokenizer, problems: list[Problem], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of lines in batches: where the prompts end; and bool, (B, T) each: whether the gate is open, whether a
    number follows, and whether one could be computed there. Nothing for a model without gate."""
    if not has_gate(model):
        return
    separator_id = tokenizer.separator_id
    thousands = model.config.dag_thousands
    lexer = Lexer(tokenizer.vocabulary, separator_id, 1, thousands).to(model.lm_head.weight.device)
    for batch in in_batches(problems, batch_size):
        prompts = [encode(tokenizer, problem.prompt) for problem in batch]
        answers = [writable(tokenizer, problem.answer) for problem in batch]
        idx, state = inspect(model, tokenizer, [prompt + answer for prompt, answer in zip(prompts, answers)])
        opens = lexer.following(F.pad(idx, (0, 1), value=separator_id)).opens
        ends = [len(prompt) - 1 for prompt in prompts]
        yield ends, state.gate[..., 0] > OPEN, opens, positions.may_compute(lexer, idx, lexer(idx))


def writable(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Its tokens; none where it has characters outside the vocabulary."""
    try:
        return tokenizer.encode(answer)
    except ValueError:
        return []


def inspect(
    model: GPT, tokenizer: Tokenizer, rows: list[list[int]]
) -> tuple[torch.Tensor, DAGState | DenseState]:
    """Rows of tokens -> as many of them as the context holds, padded, (B, T), and what the DAG does there."""
    cut = [torch.tensor(row[: model.config.block_size]) for row in rows]
    idx = pad_sequence(cut, batch_first=True, padding_value=tokenizer.separator_id)
    idx = idx.to(model.lm_head.weight.device)
    return idx, model.inspect(idx)


# ------------------------------------------------------------------------------------------------------------
# failures


def diagnose(
    model: GPT, tokenizer: Tokenizer, attempts: list[Attempt], batch_size: int = 64
) -> list[Attempt]:
    """The attempts; the failed ones say which part failed, and what the plan was."""
    attempts = list(attempts)
    failed = [n for n, attempt in enumerate(attempts) if not attempt.correct]
    for batch in in_batches(failed, batch_size):
        prompts = [encode(tokenizer, attempts[n].prompt) for n in batch]
        kept = [right_beginning(tokenizer, attempts[n]) for n in batch]
        state = None
        if model.reads_numbers:
            _, state = inspect(model, tokenizer, [prompt + tokens for prompt, tokens in zip(prompts, kept)])
        for row, (n, prompt, tokens) in enumerate(zip(batch, prompts, kept)):
            part, plan = "model", ""
            if len(prompt) + len(tokens) > model.config.block_size:
                part = "context"
            elif state is not None:
                part, plan = blame(model.dag, tokenizer, state, row, attempts[n], prompt, tokens)
            attempts[n] = replace(attempts[n], part=part, plan=plan)
    return attempts


def right_beginning(tokenizer: Tokenizer, attempt: Attempt) -> list[int]:
    """The output's tokens up to where it departs from the answer, blanks before it aside."""
    texts = (tokenizer.decode(attempt.tokens[:n]).lstrip() for n in range(len(attempt.tokens) + 1))
    return list(attempt.tokens[: len(list(takewhile(attempt.answer.strip().startswith, texts))) - 1])


def blame(
    dag: DifferentiableDAG,
    tokenizer: Tokenizer,
    state: DAGState,
    row: int,
    attempt: Attempt,
    prompt: list[int],
    kept: list[int],
) -> tuple[str, str]:
    """Which part failed, and the plan as text. `row` of `state` is the prompt and the right beginning of the
    output: what the DAG offers at its end is for the first token that went wrong."""
    tokens, answer = prompt + kept, attempt.answer.strip()
    first, departs = len(prompt) - 1, len(tokens) - 1
    n = newest_plan(state, row, first, departs)
    if n is None:
        blind = unread(attempt.prompt, numbers_after(dag, tokens)) or not may_plan(dag, tokens, first)
        return "reading" if blind else "gate", ""
    made_at, symbols, written = int(state.position[n]), state.symbols[n], state.written[n]
    numbers = numbers_after(dag, tokens[: made_at + 1])
    value, plan = run_again(dag, state, n, numbers)

    start = max(made_at, first)  # the prompt may have begun the number, with its sign
    before = tokenizer.decode(kept[: start - first]).lstrip()
    if symbols and before + tokenizer.decode(symbols[start - made_at : -1]) == answer:
        holds = int(state.offers.plan[row, departs]) == n
        is_open = state.gate[row, departs if holds else start, 0] > OPEN
        return "writing" if is_open else "gate", plan
    if value is not None and writes(value, answer, dag.digits):
        return "writing", plan
    if unread(attempt.prompt, numbers):
        return "reading", plan
    return "execution" if written is None else "plan", plan


def newest_plan(state: DAGState, row: int, first: int, last: int) -> int | None:
    """The plan that makes an offer at `last`, else the newest made from `first` on, if there is one."""
    n = int(state.offers.plan[row, last])
    if n < len(state.symbols):
        return n
    made = (state.row == row) & (state.position >= first) & (state.position <= last)
    return int(made.nonzero()[-1]) if made.any() else None


def run_again(
    dag: DifferentiableDAG, state: DAGState, n: int, numbers: list[exact_arithmetic.Rational]
) -> tuple[exact_arithmetic.Rational | None, str]:
    """The value of plan n over these numbers, and the plan as text."""
    steps = steps_of(dag, state.plans, n)
    slots = numbers + [None] * (dag.planner.num_inputs - len(numbers))
    slots += exact_arithmetic.run(steps, slots, dag.digits, dag.operations)
    return slots[-1], plan_text(dag, steps, slots, state.written[n])


def reader_after(dag: DifferentiableDAG, tokens: list[int]) -> Reader:
    reader = Reader(dag.lexer)
    for token in tokens:
        reader.feed(token)
    return reader


def numbers_after(dag: DifferentiableDAG, tokens: list[int]) -> list[exact_arithmetic.Rational]:
    """The numbers that a plan after these tokens sees, the newest first."""
    return [exact_arithmetic.from_decimal(*number) for number in reader_after(dag, tokens).numbers]


def may_plan(dag: DifferentiableDAG, tokens: list[int], first: int) -> bool:
    """Whether a number may open after one of the tokens from `first` on, with others before it."""
    readers = (reader_after(dag, tokens[: last + 1]) for last in range(first, len(tokens)))
    return any(reader.may_open and reader.numbers for reader in readers)


def unread(prompt: str, numbers: list[exact_arithmetic.Rational]) -> bool:
    """Whether the prompt has numbers, as a person reads it, that are not among the DAG's, signs aside."""
    spelled = Counter(to_number(match[0].replace(",", "")) for match in SPELLED.finditer(prompt))
    return bool(spelled - Counter(abs(Fraction(*number)) for number in numbers))


def writes(value: exact_arithmetic.Rational, answer: str, digits: int) -> bool:
    """Whether the value in any format is the answer."""
    return Fraction(*value) == to_number(answer) or bool(
        exact_arithmetic.matching_formats(value, answer, digits)
    )
