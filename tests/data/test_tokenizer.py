"""Any text survives a round trip, digits stand alone, and a tokenizer survives JSON."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import tokenizer
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, build, from_json

SAMPLE = (
    "the room 12 of the house costs 1234 and the other room costs 12345.\n"
    "they're sure it isn't the room, it's the other:  naïve café, 日本語\t12+34=46 <|endoftext|>\n"
) * 4
BPE = build("bpe", SAMPLE, vocab_size=320)


@pytest.fixture
def gpt2(monkeypatch):
    """A GPT-2 tokenizer without a download: the ranks are those of BPE."""
    ranks = {token.encode("latin-1"): rank for rank, token in enumerate(BPE.tokens)}
    encoding = tokenizer.tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return GPT2Tokenizer()


@given(st.text())
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_any_text_survives_a_round_trip(kind, text):
    tok = BPE if kind == "bpe" else build(kind, text)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert b"".join(map(tok.token_bytes, ids)) == text.encode()
    assert all(0 <= i < tok.vocab_size for i in ids)
    np.testing.assert_array_equal(tok.encode_array(text), ids)
    assert tok.encode_array(text).dtype == np.int64


@given(st.text("0123456789 ,.-+a\n'é<|endoftext|>"))
@pytest.mark.parametrize(
    "tok",
    [build("char", "0123456789 ,.-+a\n'é<|endoftext|>"), ByteTokenizer(), BPE],
    ids=lambda tok: tok.kind,
)
def test_every_digit_is_one_token(tok, text):
    tokens = [tok.token_bytes(i) for i in tok.encode(text)]
    digits = [token for token in tokens if re.search(rb"\d", token)]
    assert b"".join(digits).decode() == "".join(re.findall("[0-9]", text))
    assert all(len(token) == 1 for token in digits)


def test_no_token_of_a_trained_vocabulary_joins_digits():
    assert [t for t in BPE.tokens if re.search(r"\d", t) and len(t) > 1] == []
    assert " the" in BPE.tokens  # it did learn


def test_gpt2_takes_the_ranks_but_not_the_pattern(gpt2):
    assert gpt2.kind == "gpt2" and gpt2.separator_id == len(BPE.tokens)
    assert gpt2.encode(SAMPLE) == BPE.encode(SAMPLE)
    assert from_json(json.loads(json.dumps(gpt2.to_json()))).encode(SAMPLE) == gpt2.encode(SAMPLE)


def test_gpt2_offline_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("long\nstory")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(OSError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


@pytest.mark.parametrize("tok", [build("char", SAMPLE), ByteTokenizer(), BPE], ids=lambda tok: tok.kind)
def test_json_keeps_the_vocabulary(tok):
    again = from_json(json.loads(json.dumps(tok.to_json())))
    assert type(again) is type(tok)
    assert again.to_json() == tok.to_json()
    assert (again.vocab_size, again.separator_id) == (tok.vocab_size, tok.separator_id)
    assert again.encode(SAMPLE) == tok.encode(SAMPLE)


@pytest.mark.parametrize("tok", [CharTokenizer("ab\n"), ByteTokenizer()], ids=lambda tok: tok.kind)
def test_separator_of_lines_is_the_newline(tok):
    assert tok.encode("a\n")[-1] == tok.separator_id
    assert tok.decode([tok.separator_id]) == tok.separator == "\n"


def test_separator_of_bpe_is_written_by_no_text():
    assert BPE.decode([BPE.separator_id]) == BPE.separator == "<|endoftext|>"
    assert BPE.separator_id == BPE.vocab_size - 1
    assert BPE.separator_id not in BPE.encode("a<|endoftext|>b")


def test_char_names_the_character_and_its_position():
    tok = build("char", "abc")
    with pytest.raises(ValueError, match="'é' at position 3"):
        tok.encode("abcé")
    with pytest.raises(ValueError, match="'B' at position 1"):  # inside the range of the table
        tok.encode("aB")


def test_a_text_in_parts_gives_the_same_vocabulary():
    lines = SAMPLE.splitlines(keepends=True)
    assert build("char", iter(lines)).to_json() == build("char", SAMPLE).to_json()
    assert build("bpe", iter(lines), 320).to_json() == BPE.to_json()


def test_bpe_has_every_byte_and_the_size_asked_for():
    assert {t for t in BPE.tokens if len(t) == 1} == {chr(byte) for byte in range(256)}
    assert BPE.vocab_size == 320
    assert build("bpe", "abc", 4096).vocab_size == 257  # no pair occurs twice
    assert BPE.decode([BPE.tokens.index("\xc3")]) == "\ufffd"  # half of a character


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("words", "a b"), "choose one of char"),
        (("bpe", "a b", 256), "too small"),
        (("char", "a b", 100), "vocab_size=100"),
    ],
)
def test_mistakes_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


@pytest.mark.parametrize("chars", ["ab", "aab\n"])
def test_char_refuses_a_vocabulary_that_cannot_work(chars):
    with pytest.raises(ValueError, match="newline"):
        CharTokenizer(chars)
