"""Generation: the cache changes speed alone, rows do not feel each other, sampling follows the model."""

from itertools import product

import pytest
import torch
from conftest import DENSE, SEPARATOR

from dag.dense import CONTEXTS, FOLDS, INPUTS, PLANS, VALUES
from inference.engine import choose, generate, random_numbers, windows

RAGGED = [[3], [5, 1, 7, 2, 9], list(range(16)), [28, 0, 28]]  # 16 is tiny_gpt's block_size
PLAIN = dict(dag_depth=0)
SEQUENCE = dict(dag_depth=3, dag_context="attention", dag_post_block=True, **DENSE["sequence"])
NUMBERS = dict(dag_depth=3, separator_id=SEPARATOR)
COMBINATIONS = [
    dict(dag_depth=3, dag_post_block=True, dag_inputs=i, dag_values=v, dag_plan=p, dag_fold=f, dag_context=c)
    for i, v, p, f, c in product(INPUTS, VALUES, PLANS, FOLDS, CONTEXTS)
]


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "fields", [PLAIN, NUMBERS, *COMBINATIONS], ids=lambda f: "-".join(map(str, f.values()))
)
def test_cached_equals_uncached(tiny_gpt, fields, temperature):
    model = tiny_gpt(**fields)
    fast, slow = (
        generate(model, RAGGED, 30, temperature=temperature, seed=5, cached=c) for c in (True, False)
    )
    assert fast == slow
    assert len({token for row in slow for token in row}) > 5  # the model does not just repeat itself


@pytest.mark.parametrize("fields", [PLAIN, SEQUENCE, NUMBERS], ids=["plain", "sequence", "numbers"])
def test_a_row_does_not_depend_on_its_batch(tiny_gpt, fields):
    model = tiny_gpt(**fields)
    together = generate(model, RAGGED, 30, seed=5, stop=[[4]])
    for row, prompt in enumerate(RAGGED):
        assert [together[row]] == generate(model, [prompt], 30, seed=5 + row, stop=[[4]])
    assert len(set(map(len, together))) > 1  # some rows stopped while others went on


def test_window_rule_beyond_block_size(tiny_gpt):
    model = tiny_gpt(**SEQUENCE)
    context, expected = [5, 1, 7], []
    for _ in range(40):
        if len(context) > 16:
            context = context[-8:]
        token = model(torch.tensor([context]))[0][0, -1].argmax().item()
        context.append(token)
        expected.append(token)
    assert generate(model, [[5, 1, 7]], 40, temperature=0) == [expected]


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
@pytest.mark.parametrize("prompt", [1, 2, 5, 16])
def test_windows_are_the_contexts_that_generate_reads(tiny_gpt, monkeypatch, block_size, prompt):
    model = tiny_gpt(dag_depth=0, block_size=block_size)
    tokens, contexts = torch.randint(28, (min(prompt, block_size),)).tolist(), []

    def spy(idx, cache, hidden_states=model.hidden_states):
        contexts.append(idx[0].tolist())
        return hidden_states(idx, cache)

    monkeypatch.setattr(model, "hidden_states", spy)
    given = len(tokens)
    tokens += generate(model, [tokens], 40, temperature=3.0, seed=1, cached=False)[0]
    told = {t: tokens[begin:t] for begin, *span in windows(len(tokens), block_size) for t in range(*span)}
    assert list(told) == list(range(1, len(tokens)))
    assert [told[t] for t in range(given, len(tokens))] == contexts


def test_cached_decoding_reads_every_token_once(tiny_gpt, monkeypatch):
    model = tiny_gpt(dag_depth=2)
    read, hidden_states = [], model.hidden_states

    def counting(idx, cache):
        read.append(idx.size(1))
        return hidden_states(idx, cache)

    monkeypatch.setattr(model, "hidden_states", counting)
    generate(model, [[5, 1, 7]], 15, temperature=0)
    assert read == [3] + [1] * 13 + [8]  # the prompt, tokens up to 16, then the window


def test_stop_sequences_end_their_row_alone(tiny_gpt):
    model = tiny_gpt(dag_depth=2)
    free = generate(model, RAGGED, 12, seed=7)
    ending = free[1][4:6]
    assert all(ending != row[i : i + 2] for row in (free[0], *free[2:]) for i in range(12)), "choose another"
    stopped = generate(model, RAGGED, 12, seed=7, stop=[[99], ending, [*ending, 99]])
    assert stopped == [free[0], free[1][:6], free[2], free[3]]


def test_a_prompt_does_not_stop_its_row(tiny_gpt):
    model = tiny_gpt(dag_depth=2)
    free = generate(model, [[5, 1]], 12, seed=5)
    assert 1 not in free[0][:1]
    assert generate(model, [[5, 1]], 12, seed=5, stop=[[1, free[0][0]]]) == free


@pytest.mark.parametrize("settings", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-6)], ids=str)
def test_extreme_settings_are_greedy(tiny_gpt, settings):
    model = tiny_gpt(dag_depth=2)
    greedy = generate(model, RAGGED, 20, temperature=0)
    assert generate(model, RAGGED, 20, seed=5, **settings) == greedy
    assert generate(model, RAGGED, 20, seed=5) != greedy


def test_seeds(tiny_gpt):
    model = tiny_gpt(dag_depth=0)
    before = torch.get_rng_state()
    first = generate(model, [[1]] * 3, 20, seed=5)
    assert generate(model, [[1]] * 3, 20, seed=5) == first
    assert len(set(map(tuple, first))) == 3  # the same prompt, other samples
    assert [row[:9] for row in first] == generate(model, [[1]] * 3, 9, seed=5)  # more tokens go on from fewer
    assert generate(model, [[1]], 20, seed=6)[0] == first[1]
    assert generate(model, [[1]] * 3, 20) != generate(model, [[1]] * 3, 20)
    assert torch.equal(torch.get_rng_state(), before)  # so sampling never changes a training run


def frequencies(logits, num_draws=20_000, **settings):
    uniform = random_numbers(1, num_draws, seed=0).T
    settings = dict(top_k=None, top_p=None) | settings
    tokens = choose(torch.tensor([logits]).expand(num_draws, -1), uniform, **settings)
    return torch.bincount(tokens, minlength=len(logits)) / num_draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sampling_follows_the_softmax(temperature):
    logits = [0.3, -1.0, 2.0, 0.0, 1.0]
    expected = torch.softmax(torch.tensor(logits) / temperature, dim=0)
    spread = (expected * (1 - expected) / 20_000).sqrt()
    assert ((frequencies(logits, temperature=temperature) - expected).abs() < 4 * spread).all()


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(top_k=3), [0.5, 0.0, 0.25, 0.125]),
        (dict(top_k=99), [0.5, 0.0625, 0.25, 0.125, 0.0625]),
        (dict(top_p=0.49), [0.5]),
        (dict(top_p=0.51), [0.5, 0.0, 0.25]),
        (dict(top_p=1.0), [0.5, 0.0625, 0.25, 0.125, 0.0625]),
        (dict(top_k=2, top_p=0.7), [0.5, 0.0, 0.25]),  # after the cut to two, 0.5 counts for 2/3
        (dict(top_k=2, top_p=0.6), [0.5]),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep_the_likeliest(settings, kept):
    probabilities = torch.tensor([0.5, 0.0625, 0.25, 0.125, 0.0625])
    expected = torch.zeros(5)
    expected[: len(kept)] = torch.tensor(kept)
    expected /= expected.sum()
    found = frequencies(probabilities.log().tolist(), temperature=1.0, **settings)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, atol=0.015)


def test_tokens_are_streamed_as_they_come(tiny_gpt):
    model = tiny_gpt(dag_depth=2)
    calls = []
    rows = generate(model, RAGGED[:3], 6, seed=5, on_token=lambda row, token: calls.append((row, token)))
    assert calls == [(row, rows[row][step]) for step in range(6) for row in range(3)]


def test_on_token_may_end_its_row(tiny_gpt):
    model = tiny_gpt(dag_depth=2)
    free = generate(model, RAGGED, 20, seed=5)
    count = [0] * 4

    def on_token(row, token):
        count[row] += 1
        return row == 2 and count[row] == 3

    assert generate(model, RAGGED, 20, seed=5, on_token=on_token) == [free[0], free[1], free[2][:3], free[3]]
    assert count == [20, 20, 3, 20]


def test_nothing_to_do(tiny_gpt):
    model = tiny_gpt(dag_depth=2)
    assert generate(model, RAGGED, 0) == [[]] * 4
    assert generate(model, [], 5) == []


@pytest.mark.parametrize(
    "prompts, settings, words",
    [
        ([[1], []], {}, "empty prompt"),
        ([[1], [0] * 17], {}, "17 tokens .* shorten it to 16"),
        ([[1]], dict(temperature=-1), "temperature=-1"),
        ([[1]], dict(temperature=float("nan")), "temperature=nan"),
        ([[1]], dict(top_k=0), "top_k=0"),
        ([[1]], dict(top_p=0.0), "top_p=0.0"),
        ([[1]], dict(top_p=1.5), "top_p=1.5"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens=-1"),
    ],
)
def test_mistakes_are_named(tiny_gpt, prompts, settings, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_gpt(dag_depth=0), prompts, **dict(max_new_tokens=3) | settings)


def test_a_model_in_train_mode_is_refused(tiny_gpt):
    with pytest.raises(AssertionError, match="eval"):
        generate(tiny_gpt(dag_depth=0).train(), [[1]], 3)
