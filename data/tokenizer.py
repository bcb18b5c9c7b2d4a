"""Text <-> token ids: characters, bytes, GPT-2's byte-pair encoding, or one trained on the text at hand.

    tokenizer = build("bpe", open("train.txt").read(), vocab_size=4096)
    ids = tokenizer.encode("12+7*3=33")
    tokenizer = from_json(tokenizer.to_json())     # plain JSON; a data set keeps it in its meta.json

- every digit 0-9 is a token of its own in every tokenizer: numbers can be read from the tokens
- decode(encode(text)) == text; byte, gpt2 and bpe take any text, char only the characters of its vocabulary
- no text encodes to the <|endoftext|> token of gpt2 and bpe, not even "<|endoftext|>"

Sources: GPT-2's vocabulary and pattern, https://github.com/openai/gpt-2/blob/master/src/encoder.py;
encoding, https://github.com/openai/tiktoken; training, https://github.com/huggingface/tokenizers
"""

from collections.abc import Iterable

import numpy as np
import tiktoken

# GPT-2's, but for numbers, where it has ` ?\p{N}+`. It cuts a text into pieces, and no token crosses a cut.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What all have in common. The separator stands at the end of every document."""

    kind: str
    vocab_size: int
    separator = "\n"
    separator_id: int

    def encode_array(self, text: str) -> np.ndarray:
        """int64 ids; for long texts much faster than a list."""
        raise NotImplementedError

    def token_bytes(self, id: int) -> bytes:
        """The text of one token, in UTF-8; a token of a byte-pair encoding may hold a part of a character."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> list[bytes]:
        """The text of every token, in the order of the ids."""
        return [self.token_bytes(id) for id in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, as a model may generate them, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def to_json(self) -> dict:
        """{"kind": ..., and the arguments of the class}"""
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """A token a character; `chars` in the order of their ids, "\n" among them."""

    kind = "char"

    def __init__(self, chars: str):
        if "\n" not in chars or len(set(chars)) < len(chars):
            raise ValueError(f"a vocabulary of characters has each of them once, and the newline: {chars!r}")
        self.chars = chars
        self.vocab_size = len(chars)
        self.separator_id = chars.index(self.separator)
        points = code_points(chars)
        self.id_of = np.full(points.max() + 2, -1, np.int64)  # the last: all characters beyond
        self.id_of[points] = np.arange(len(chars))

    def encode_array(self, text):
        ids = self.id_of[np.minimum(code_points(text), len(self.id_of) - 1)]
        if (ids < 0).any():
            at = int(np.argmax(ids < 0))
            known = "".join(sorted(self.chars)).strip()
            raise ValueError(
                f"character {text[at]!r} at position {at} is not in the vocabulary: the blank, {known[:100]}"
                f"{'...' * (len(known) > 100)}; text of your own may take --tokenizer=byte"
            )
        return ids

    def token_bytes(self, id):
        return self.chars[id].encode("utf-8", errors="surrogatepass")

    def to_json(self):
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer(Tokenizer):
    """A token a byte of the text's UTF-8."""

    kind = "byte"
    vocab_size = 256
    separator_id = ord("\n")

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def token_bytes(self, id):
        return bytes([id])


class BPETokenizer(Tokenizer):
    """Byte-pair encoding. `tokens` holds the bytes of every token written as Latin-1, a character a byte, in the
    order in which they were merged; the separator follows as the last id. All single bytes are tokens.
    """

    kind = "bpe"
    separator = END_OF_TEXT

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        ranks = {token.encode("latin-1"): rank for rank, token in enumerate(tokens)}
        self.separator_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding(
            self.kind, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.separator_id}
        )

    def encode_array(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int64)

    def token_bytes(self, id):
        return self.encoding.decode_single_token_bytes(id)

    def to_json(self):
        return {"kind": self.kind, "tokens": self.tokens}


class GPT2Tokenizer(BPETokenizer):
    """GPT-2's vocabulary and ids, so that its weights can be used. Texts without numbers encode as in GPT-2,
    which itself mostly saw numbers in pieces of several digits and with the space before them.
    """

    kind = "gpt2"

    def __init__(self):
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except OSError as error:
            raise OSError(
                "GPT-2's vocabulary is not on this machine and cannot be downloaded: connect "
                "it once, or set TIKTOKEN_CACHE_DIR to a filled cache of tiktoken"
            ) from error
        super().__init__([token.decode("latin-1") for token in sorted(ranks, key=ranks.get)])

    def to_json(self):
        return {"kind": self.kind}


TOKENIZERS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, GPT2Tokenizer, BPETokenizer)}


def from_json(d: dict) -> Tokenizer:
    return tokenizer_class(d.get("kind"))(**{key: value for key, value in d.items() if key != "kind"})


def build(kind: str, text: str | Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer for a text, or for one that comes in parts. `vocab_size` is for bpe alone, and an upper
    limit: a short text does not have that many pairs that occur twice.
    """
    cls = tokenizer_class(kind)
    if vocab_size is not None and cls is not BPETokenizer:
        raise ValueError(f"vocab_size={vocab_size} goes with bpe alone, {kind} has its own: leave it out")
    texts = [text] if isinstance(text, str) else text
    if cls is CharTokenizer:
        return cls("".join(sorted(set("\n").union(*texts))))
    if cls is BPETokenizer:
        return cls(train_bpe(texts, 4096 if vocab_size is None else vocab_size))
    return cls()


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[str]:
    """-> the tokens of a BPETokenizer of at most `vocab_size`"""
    import tokenizers  # for training alone
    from tokenizers import models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size={vocab_size} is too small, bpe needs at least {len(alphabet) + 1}")
    trainee = tokenizers.Tokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainee.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        ),
    )
    # The library writes a byte as a printable character: as itself, or else as the next one from U+0100 on.
    byte_of = {char: char for char in alphabet if ord(char) < 256}
    hidden = (chr(byte) for byte in range(256) if chr(byte) not in byte_of)
    byte_of |= dict(zip((char for char in alphabet if char not in byte_of), hidden, strict=True))
    vocab = trainee.get_vocab()
    return ["".join(map(byte_of.get, token)) for token in sorted(vocab, key=vocab.get)]


def tokenizer_class(kind: str) -> type[Tokenizer]:
    if kind not in TOKENIZERS:
        raise ValueError(f"unknown tokenizer {kind!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind]


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
