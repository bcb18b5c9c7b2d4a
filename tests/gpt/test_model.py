"""The GPT: causality, cached decoding, Hugging Face's weights, initialisation, loss, and what it refuses.

Everything that must hold for every system runs over the product of the model's registries and over every file
in config/, so a new entry is tested from the day it is added.
"""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DENSE, ROOT, SEPARATOR, VOCABULARY

from configurator import parse as parse_config
from configurator import pick
from dag.dense import CONTEXTS
from dag_model import GPT, GPTConfig
from gpt.kv_cache import KVCache
from gpt.model_config import CHOICES_BY_INPUTS as CHOICES
from training.train_config import TrainConfig

COMBINATIONS = []
for inputs, legal in CHOICES.items():
    settings = dict(dag_inputs=[inputs], **legal)
    if inputs != "numbers":
        settings |= dict(dag_context=CONTEXTS, dag_post_block=(False, True))
    COMBINATIONS += [dict(zip(settings, choice)) for choice in itertools.product(*settings.values())]
PRESETS = sorted((ROOT / "config").glob("*.py"))
SYSTEMS = [{"dag_depth": 0}, *COMBINATIONS, *PRESETS]


def system_name(system) -> str:
    return system.stem if system in PRESETS else "-".join(map(str, system.values()))


@pytest.fixture(params=[-1, SEPARATOR], ids=["endless", "documents"])
def separator_id(request) -> int:
    return request.param


@pytest.fixture(params=SYSTEMS, ids=system_name)
def model(request, tiny_gpt, separator_id) -> GPT:
    fields = request.param
    if fields in PRESETS:
        preset = pick(parse_config(TrainConfig, [str(fields)])[0], GPTConfig)
        fields = {name: value for name, value in vars(preset).items() if name.startswith("dag_")} | dict(
            dag_leaves=2
        )
    return tiny_gpt(**fields, separator_id=separator_id, dropout=0.3)


def tokens(*shape) -> torch.Tensor:
    """Random text, half of it digits: it has numbers, and now and then one that a plan explains."""
    return torch.where(torch.rand(shape) < 0.25, torch.randint(10, shape), torch.randint(29, shape))


def cached_logits(model: GPT, idx: torch.Tensor, cache: KVCache, lengths=None) -> torch.Tensor:
    hidden, _ = model.hidden_states(idx, cache)
    cache.commit(lengths)
    return model.lm_head(hidden)


# every system


@torch.no_grad()
def test_a_token_never_changes_the_logits_before_it(model):
    T = model.config.block_size
    idx = tokens(1, T).repeat(T + 1, 1)  # row j has another token j; the last row is the original
    idx[range(T), range(T)] = (idx[range(T), range(T)] + 1) % 29
    logits, _ = model(idx)
    changed = (logits[:T] - logits[T]).abs().amax(-1)  # (row j, position)
    assert changed.tril(-1).max() <= 1e-6
    assert (changed.diagonal() > 1e-4).all() and changed.triu(1).max() > 1e-4, "the tokens do nothing"


@torch.no_grad()
def test_cached_logits_equal_the_full_forward(model):
    idx = tokens(3, 12)
    lengths = torch.tensor([5, 8, 1])  # the prompts, right-padded with tokens that must not matter
    prompts = torch.where(torch.arange(8) < lengths[:, None], idx[:, :8], tokens(3, 8))
    cache = KVCache(3, model.config.block_size)
    ours = [[row[:n] for row, n in zip(cached_logits(model, prompts, cache, lengths), lengths)]]
    for _ in range(4):
        ours.append(cached_logits(model, idx[range(3), cache.lengths][:, None], cache))
    for row, length in enumerate(cache.lengths):
        alone, _ = model(idx[row : row + 1, :length])
        torch.testing.assert_close(torch.cat([part[row] for part in ours]), alone[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_random_numbers_are_for_training_alone(model):
    idx = tokens(2, 16)

    def two_runs():
        for seed in (1, 2):
            torch.manual_seed(seed)
            yield model(idx)[0]

    assert torch.equal(*two_runs())
    model.train()
    assert not torch.equal(*two_runs())


def test_every_parameter_learns_from_a_fresh_start(model):
    torch.manual_seed(0)
    model = GPT(model.config, VOCABULARY)  # the real initialisation
    idx = tokens(32, 16)
    idx[:8] = torch.tensor([1, VOCABULARY.index(b"*")]).repeat(
        8
    )  # most plans explain 1*1*1, so some are offered whole
    model(idx, idx.roll(-1, 1))[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
        # the text above is seldom what a mixture of all operations comes to, so that its number would be over
        is_too_rare = name == "dag.over_vector" and model.config.dag_plan == "soft"
        assert parameter.grad.any() or is_too_rare, f"the gradient of {name} is zero"


# the trunk


@torch.no_grad()
def test_the_plain_gpt_is_the_trunk_of_the_dag_model(tiny_gpt):
    full, plain = tiny_gpt(dag_depth=4, **DENSE["sequence"]), tiny_gpt(dag_depth=0)
    shared = plain.state_dict().keys()
    assert shared == {name for name in full.state_dict() if not name.startswith("dag.")}
    plain.load_state_dict({name: full.state_dict()[name] for name in shared})
    idx = tokens(2, 16)
    assert not torch.equal(full(idx)[0], plain(idx)[0])
    full.dag = None
    assert torch.equal(full(idx)[0], plain(idx)[0])
    assert plain.inspect(idx) is None


@torch.no_grad()
def test_without_numbers_the_default_dag_leaves_the_plain_gpt(tiny_gpt):
    full, plain = tiny_gpt(separator_id=SEPARATOR), tiny_gpt(dag_depth=0, separator_id=SEPARATOR)
    plain.load_state_dict({name: full.state_dict()[name] for name in plain.state_dict()})
    full.dag.near_digit.weight.zero_()  # what tells the trunk how far into a number a token is
    words = torch.randint(SEPARATOR, 29, (4, 16))
    torch.testing.assert_close(full(words)[0], plain(words)[0], rtol=0, atol=1e-5)
    words[:, ::3], words[:, 1::3] = torch.randint(10, (4, 6)), VOCABULARY.index(b"=")
    assert not torch.allclose(full(words)[0], plain(words)[0])


@torch.no_grad()
def test_a_silent_model_says_what_its_trunk_says(model):
    idx = tokens(4, 16)
    said = []
    final = model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: said.append(output))
    spoken = model(idx)[0]
    model.silent = True
    assert torch.equal(model(idx)[0], model.lm_head(said[-1]))
    assert torch.equal(spoken, model(idx)[0]) == (model.dag is None)
    final.remove()


@torch.no_grad()
def test_documents_in_a_row_have_the_logits_they_have_alone(tiny_gpt):
    """Whatever stands before the separator: a row is a pack of documents."""
    for fields in SYSTEMS:
        if fields in PRESETS:
            continue
        model = tiny_gpt(**fields, separator_id=SEPARATOR)
        first, second = tokens(4, 7), tokens(4, 8)
        packed = torch.cat([first, torch.full((4, 1), SEPARATOR), second], dim=1)
        torch.testing.assert_close(model(packed)[0][:, 8:], model(second)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("fields", [dict(dag_depth=0), DENSE["token"], {}], ids=["plain", "token", "numbers"])
@torch.no_grad()
def test_logits_equal_hugging_faces_gpt2(fields):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    ).eval()
    for parameter in theirs.parameters():  # also biases and LayerNorms, which start at 0 and 1
        parameter.normal_(std=0.3)
    ours = GPT.from_huggingface(theirs, [b"a"] * 61, **fields).eval()
    assert (ours.dag is None) == ("dag_depth" in fields)
    ours.silent = True
    if ours.reads_numbers:
        ours.dag.near_digit.weight.zero_()
    idx = torch.randint(61, (2, 24))
    expected = theirs(idx).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(idx)[0], expected, rtol=0, atol=1e-4)


def test_a_missing_transformers_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        GPT.from_huggingface("gpt2")


def test_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=True, dag_depth=0
            )
        )
    assert model.num_parameters() == 124_439_808
    assert model.num_parameters(embeddings=False) == 124_439_808 - 1024 * 768


def test_head_and_embedding_are_one_tensor_after_loading_and_a_step(tiny_gpt):
    model = tiny_gpt()
    model.load_state_dict(tiny_gpt().state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names


@pytest.mark.parametrize("dag_depth", [0, 4])
def test_initialisation(dag_depth):
    config = GPTConfig(dag_depth=dag_depth, vocab_size=29, bias=True)

    def fresh():
        torch.manual_seed(0)
        return GPT(config, VOCABULARY).eval()

    model, again = fresh(), fresh()
    for (name, parameter), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(parameter, other), f"{name} is not initialised from the seed"
        if name.endswith("bias"):
            assert not parameter.any(), name
    mlp = model.transformer.h[0].mlp
    ratio = mlp.c_fc.weight.std() / mlp.c_proj.weight.std()
    assert ratio.item() == pytest.approx(math.sqrt(2 * config.n_layer), rel=0.05)
    idx = torch.randint(config.vocab_size, (8, 64))
    loss = model(idx, torch.randint(config.vocab_size, (8, 64)))[1]
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.1)  # knows nothing, claims nothing


def test_loss_is_the_mean_over_targets_that_are_not_ignored(tiny_gpt):
    model, idx, targets = tiny_gpt(), tokens(2, 16), tokens(2, 16)
    targets[0, :5] = targets[1, 3] = -1
    logits, loss = model(idx, targets)
    kept = targets != -1
    assert loss.item() == pytest.approx(F.cross_entropy(logits[kept], targets[kept]).item(), rel=1e-5)
    assert model(idx)[1] is None


@torch.no_grad()
def test_crop_block_size_keeps_what_shorter_contexts_see(tiny_gpt):
    model, idx = tiny_gpt(separator_id=SEPARATOR), tokens(2, 10)
    before, _ = model(idx)
    model.crop_block_size(10)
    assert torch.equal(model(idx)[0], before)
    assert model.config.block_size == 10 and model.state_dict()["transformer.wpe.weight"].shape == (10, 16)
    with pytest.raises(AssertionError, match="block_size 10"):
        model(tokens(1, 11))
    with pytest.raises(ValueError, match="--block_size=10"):
        model.crop_block_size(11)


def test_the_cache_refuses_tokens_beyond_the_context():
    cache = KVCache(batch_size=2, block_size=4)
    cache.begin(3)
    cache.commit(torch.tensor([3, 1]))
    assert cache.begin(1).tolist() == [[3], [1]]
    with pytest.raises(ValueError, match="5 tokens .* context of 4"):
        cache.begin(2)


@pytest.mark.parametrize("inputs", CHOICES)
@pytest.mark.parametrize("field", ["dag_inputs", "dag_values", "dag_plan", "dag_fold", "dag_context"])
def test_an_unknown_choice_names_the_known_ones(field, inputs):
    legal = dict(dag_inputs=CHOICES, dag_context=CONTEXTS, **CHOICES[inputs])
    fields = {name: next(iter(choices)) for name, choices in legal.items()}
    fields |= {"dag_inputs": inputs, field: "nonsense"}
    with pytest.raises(ValueError, match=f"{field} is 'nonsense'; choose from {', '.join(legal[field])}"):
        GPT(GPTConfig(**fields), VOCABULARY)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(n_embd=30, n_head=4), "n_embd=30 .* n_head=4"),
        (dict(dag_ops="add,modulo"), "'modulo'; choose from add, .*min"),
        (dict(dag_ops=""), "choose from add"),
        (dict(dag_ops="add,multiply"), "lacks identity"),
        (dict(dag_inputs="token"), "dag_values is 'literal'; choose from learned with dag_inputs=token"),
        (dict(dag_leaves=6), "dag_leaves is 6; it must be below 6"),
        (dict(dag_digit_decay=1.5), "dag_digit_decay is 1.5; it must be at most 1"),
        (dict(block_size=0), "block_size is 0; it must be at least 1"),
        (dict(dag_fold="value"), "dag_fold is 'value'; choose from digits with dag_inputs=numbers"),
    ],
)
def test_an_impossible_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**fields), VOCABULARY)


def test_a_model_that_reads_numbers_asks_for_the_text_of_its_tokens():
    with pytest.raises(ValueError, match="tokenizer.vocabulary"):
        GPT(GPTConfig())
