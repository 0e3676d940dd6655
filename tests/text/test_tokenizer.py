"""Tokenizers: exact round trips, the same learnt from the same text, and foreign files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from text_files import raised

from mpillm.text.tokenizer import Tokenizer, bpe_size, read_tokenizer, train_bpe

TEXTS = ["def tokens(self):\n    return [1, 2, 3]\n\n\n" * 20, "Grüße, 世界! 🙂 naïve café\n" * 10, "a b  c\td\r\n" * 5]
BPE = train_bpe(TEXTS, 300)


@settings(max_examples=60, deadline=None)
@given(strategies.text(max_size=80))
def test_round_trip(text):
    for tokenizer in (Tokenizer.of_bytes(), BPE):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocabulary


def test_bytes():
    tokenizer = Tokenizer.of_bytes()
    assert (tokenizer.vocabulary, tokenizer.end, tokenizer.separable) == (257, 256, True)
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode([97, 256, 195, 98, 1000]) == "a\N{REPLACEMENT CHARACTER}b"


def test_bpe_has_the_vocabulary_asked_for():
    assert BPE.vocabulary == 300 and BPE.end == 0 and BPE.separable
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_does_not_depend_on_the_order_of_the_texts():
    assert train_bpe(reversed(TEXTS), 300).hash == BPE.hash


def test_files():
    for tokenizer in (Tokenizer.of_bytes(), BPE):
        again = Tokenizer.from_bytes(tokenizer.to_bytes())
        assert again.hash == tokenizer.hash and again.vocabulary == tokenizer.vocabulary
        assert np.array_equal(again.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_names_of_special_tokens_in_a_text_are_text():
    text = "a <|endoftext|> b"
    assert BPE.end not in BPE.encode(text) and BPE.decode(BPE.encode(text)) == text
    assert BPE.end in BPE.encode(text, special=True)


def test_lone_surrogates_are_replaced():
    assert all(tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b" for tokenizer in (Tokenizer.of_bytes(), BPE))


def foreign(**changes):
    return json.dumps({**json.loads(BPE.to_bytes()), **changes}).encode()


def test_foreign_files_do_not_cut_or_pad(tmp_path):
    data = foreign(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
                   padding={"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                            "pad_type_id": 0, "pad_token": "<|endoftext|>"})
    (tmp_path / "tokenizer.json").write_bytes(data)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = read_tokenizer(str(path))
        assert tokenizer.to_bytes() == data
        assert tokenizer.encode_many(["a", TEXTS[0]])[1].size > 6 and tokenizer.encode("a").size == 1


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>"])
def test_end_of_document_in_foreign_files(name):
    special = [{**json.loads(BPE.to_bytes())["added_tokens"][0], "content": name}]
    model = json.loads(BPE.to_bytes())["model"]
    model["vocab"] = {name if word == "<|endoftext|>" else word: number for word, number in model["vocab"].items()}
    assert Tokenizer(foreign(added_tokens=special, model=model)).end == 0


def test_mistakes(tmp_path):
    assert "expected bytes, bpe:N or a tokenizer.json" in raised(lambda: read_tokenizer(str(tmp_path / "none.json")))
    assert "not a tokenizer.json" in raised(lambda: Tokenizer(b"{}", "x"))
    assert "not a tokenizer.json" in raised(lambda: Tokenizer(b"\xff\x00", "x"))
    for text in ("bpe:", "bpe:10", "bpe:many", "bpe:-400"):
        assert "at least 257" in raised(lambda: bpe_size(text))
    assert bpe_size("bpe:512") == 512 and bpe_size("bytes") is None
    assert "words for 2" in raised(lambda: train_bpe(["aa bb"], 4000))
