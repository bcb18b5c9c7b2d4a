"""Generate text from a trained model: key-value cache, prompts of any lengths in one batch, seeded sampling.

    prompts = [tokenizer.encode("12+7*3="), tokenizer.encode("5-")]
    tokens = generate(model, prompts, 16, temperature=0, stop=[[tokenizer.separator_id]])

- what a row becomes does not depend on the rows beside it: neither its context nor its random numbers
- cached=False reads the whole context anew for every token: slow, plain, and what the cache is tested against
- the host waits for the device once a token, at the place marked below

Window rule: a row that has outgrown the model's block_size goes on from its last block_size // 2 tokens.
They get new positions, so they are read again; that happens once in block_size // 2 tokens. `windows` says
in which context each token of a text was written.

Sources: nucleus sampling, Holtzman et al. 2019 (1904.09751); engine of https://github.com/karpathy/nanochat
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from dag_model import GPT
from gpt.kv_cache import KVCache


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    seed: int | None = None,
    cached: bool = True,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt; a stop sequence that ended a row is among them, its last.

    temperature: 0 is greedy. top_k, top_p: choose among the k most likely tokens, among the fewest tokens
    that together have probability p; with both, k cuts first. stop: token sequences that end the row that
    writes them. seed: row r draws from a generator of its own, seeded with seed + r: the same prompt alone,
    with that seed, gives the same tokens. None is a new seed every time; PyTorch's global generator is never
    touched. on_token(row, token) is called for every new token, rows in order within a step; True ends a row.

    Raises ValueError for a prompt that is empty or longer than block_size, and for settings out of range.
    """
    assert not model.training, "dropout would be on: call model.eval() first"
    block_size, device = model.config.block_size, model.lm_head.weight.device
    check(prompts, block_size, max_new_tokens, temperature, top_k, top_p)
    contexts, written = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    endings = [list(sequence) for sequence in stop]
    uniform = random_numbers(len(prompts), max_new_tokens, seed).to(device)
    running = set(range(len(prompts)))
    cache = tokens = None
    for step in range(max_new_tokens):
        if not running:
            break
        if cache is not None and cache.longest < block_size:
            logits = advance(model, tokens, cache)
        else:
            rows = sorted(running)  # the batch until the next time here; rows that end meanwhile idle
            for row in rows:
                if len(contexts[row]) > block_size:
                    contexts[row] = contexts[row][-kept(block_size) :]
            cache = KVCache(len(rows), block_size, device) if cached else None
            logits = read(model, [contexts[row] for row in rows], cache)
            draws = uniform[rows]
        tokens = choose(logits, draws[:, step, None], temperature, top_k, top_p)
        for row, token in zip(rows, tokens.tolist()):  # the host waits for the device
            if row not in running:
                continue
            contexts[row].append(token)
            written[row].append(token)
            told_to = on_token is not None and on_token(row, token)
            if told_to or any(written[row][-len(ending) :] == ending for ending in endings):
                running.remove(row)
    return written


def windows(length: int, block_size: int) -> Iterator[tuple[int, int, int]]:
    """The contexts in which a text of `length` tokens was written, as (begin, first, end): token t, of those
    from `first` to end - 1, was chosen after tokens[begin:t]. They do not depend on where the prompt ended.
    """
    begin, first = 0, 1
    while first < length:
        end = min(begin + block_size + 1, length)
        yield begin, first, end
        begin, first = end - kept(block_size), end


def kept(block_size: int) -> int:
    """Tokens of a row that has outgrown its context from which it goes on."""
    return max(block_size // 2, 1)


def check(prompts, block_size, max_new_tokens, temperature, top_k, top_p) -> None:
    for prompt in prompts:
        if not prompt:
            raise ValueError("an empty prompt: give at least one token, such as the separator of documents")
        if len(prompt) > block_size:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens does not fit the context: shorten it to {block_size}"
            )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: expected 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: expected 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: expected 1 or more, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected a probability above 0 and up to 1, or none")


def random_numbers(num_rows: int, num_tokens: int, seed: int | None) -> torch.Tensor:
    """(num_rows, num_tokens), uniform in [0, 1); drawn on the CPU, so the same for every device."""
    first = torch.Generator().seed() >> 2 if seed is None else seed
    numbers = torch.empty(num_rows, num_tokens)
    for row in range(num_rows):
        numbers[row].uniform_(generator=torch.Generator().manual_seed(first + row))
    return numbers


def read(model: GPT, contexts: list[list[int]], cache: KVCache | None) -> torch.Tensor:
    """Logits (B, vocab_size) of what follows each context; fills the cache."""
    device = model.lm_head.weight.device
    lengths = torch.tensor([len(context) for context in contexts], device=device)
    padded = pad_sequence([torch.tensor(context) for context in contexts], batch_first=True).to(device)
    hidden, _ = model.hidden_states(padded, cache)
    if cache is not None:
        cache.commit(lengths)
    return model.lm_head(hidden[torch.arange(len(contexts), device=device), lengths - 1])


def advance(model: GPT, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, vocab_size) of what follows `tokens` (B,), the newest of each row."""
    hidden, _ = model.hidden_states(tokens[:, None], cache)
    cache.commit()
    return model.lm_head(hidden[:, -1])


def choose(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> torch.Tensor:
    """Next tokens (B,) from logits (B, vocab_size) and `uniform` (B, 1), in [0, 1).

    Sampling inverts the cumulative distribution of the tokens in order of probability: one number a token.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.size(-1)
    logits, tokens = logits.topk(vocab_size if top_k is None else min(top_k, vocab_size))
    probability = torch.softmax((logits - logits[:, :1]) / temperature, dim=-1)
    cumulative = probability.cumsum(-1)
    if top_p is not None:  # a token stays where those before it fall short of top_p: the first always does
        cumulative = probability.masked_fill(cumulative - probability >= top_p, 0.0).cumsum(-1)
    position = (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, position).squeeze(-1)
