"""bpe.cpp against `tokenizers` itself, token for token."""

import logging
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import bpe, trainers
from data_prep.bpe import plain_bpe
from data_prep.build import BuildOptions, build_shards
from data_prep.encode import Encoder
from data_prep.readers import RARE_RESIDUES, RESIDUES, Document
from data_prep.tokenizer import train_tokenizer, view_tokenizer
from s2t2_dist.errors import DataError
from tests.conftest import write_fasta

LETTERS = RESIDUES + RARE_RESIDUES


def made_texts(count, longest, seed=0):
    """Random letters with repeats and motifs, which make merges overlap."""
    rng = random.Random(seed)
    pieces = [*RESIDUES, *RARE_RESIDUES, "AAA", "AAAA", "LLAG", "GHK", "GHKGHK", "QQQQQQQQ"]
    texts = []
    for _ in range(count):
        text = "".join(rng.choices(pieces, k=rng.randint(1, longest)))
        texts.append(text[: rng.randint(1, longest)])
    return texts


def trained(vocab_size, kind="bpe"):
    return trainers.train(made_texts(2000, 200), vocab_size, True, kind, "bpe")


def assert_same(tokenizer, texts, dtype=np.uint16):
    """The tokens of all texts, in one call, are those of `tokenizers`."""
    fast = plain_bpe(tokenizer)
    tokens, lengths = fast.encode([text.encode() for text in texts], 9, dtype)
    expected = [[*tokenizer.encode(t, add_special_tokens=False).ids, 9] for t in texts]
    assert lengths.tolist() == list(map(len, expected))
    assert tokens.tolist() == [i for row in expected for i in row]
    assert tokens.dtype == dtype


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])  # the latter has many merges per token
@pytest.mark.parametrize("vocab_size", [30, 60, 300, 2000])
def test_the_tokens_are_those_of_tokenizers(kind, vocab_size):
    tokenizer = trained(vocab_size, kind)
    texts = [*made_texts(400, 300, seed=1), "A", "AA", "A" * 999, LETTERS]
    assert_same(tokenizer, texts, np.uint16 if vocab_size < 2000 else np.uint32)
    assert_same(tokenizer, made_texts(2, 36_000, seed=2))


def test_many_ranks():
    """More merges than two bytes count, in an order of their own."""
    rng = random.Random(5)
    pairs = [a + b for a in LETTERS for b in LETTERS]
    merges = [(pair[0], pair[1]) for pair in pairs]
    merges += [(a, b) for a in pairs[:300] for b in pairs[300:600]]
    rng.shuffle(merges)
    merges.sort(key=lambda merge: len(merge[0]) > 1 and rng.random() < 0.5)
    vocabulary = {t: i for i, t in enumerate([*LETTERS, *dict.fromkeys(map("".join, merges))])}
    assert len(merges) > 1 << 16
    assert_same(Tokenizer(models.BPE(vocabulary, merges)), made_texts(300, 300, 3), np.uint32)


RANDOM_BPE = trained(120)


@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.text(alphabet="ALGHKQX", max_size=60), min_size=1, max_size=4))
def test_random_texts(texts):
    assert_same(RANDOM_BPE, texts)


@settings(max_examples=500, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(*[st.sampled_from(["A", "C", "AA", "AC", "CA", "AAA", "ACA", "CAAC"])] * 2),
        unique=True,
        max_size=12,
    ),
    st.text(alphabet="AC", min_size=1, max_size=40),
)
def test_random_rules(merges, text):
    """Merges that no training would give: of tokens that come later, several for one token."""
    tokens = dict.fromkeys(["A", "C"])
    tokens.update(dict.fromkeys(t for pair in merges for t in (*pair, "".join(pair))))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    assert_same(Tokenizer(models.BPE(vocabulary, merges)), [text])


def test_a_byte_without_a_token_is_left_to_tokenizers():
    tokenizer = view_tokenizer(trained(60), trainers.PROTEIN_SPECIAL)
    fast = plain_bpe(tokenizer.backend)
    for text in ("ACa", "AC DE", "<eos>", "AC\0", "É"):
        assert fast.encode([b"ACD", text.encode()], 0, np.uint16) is None
    with pytest.raises(DataError, match="document two: the tokenizer's alphabet has no 'a'"):
        Encoder(tokenizer, False).encode([Document("one", "ACD"), Document("two", "CaD")])


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Digits()),
        lambda t: setattr(t.model, "dropout", 0.1),
        lambda t: setattr(t.model, "end_of_word_suffix", "</w>"),
        lambda t: setattr(t.model, "continuing_subword_prefix", "##"),
        lambda t: setattr(t.model, "byte_fallback", True),
        lambda t: setattr(t.model, "ignore_merges", True),
        lambda t: t.add_tokens(["ACDC"]),
    ],
)
def test_any_other_rule_is_left_to_tokenizers(change):
    tokenizer = trained(60)
    assert plain_bpe(tokenizer) is not None
    change(tokenizer)
    assert plain_bpe(tokenizer) is None
    assert plain_bpe(Tokenizer(models.Unigram([("A", 0.0)], None, False))) is None


def test_without_a_compiler_the_bytes_are_the_same_and_the_log_says_so(
    tmp_path, monkeypatch, caplog
):
    records = {f"p{i}": text for i, text in enumerate(made_texts(300, 200))}
    fasta = write_fasta(tmp_path / "p.fasta", records)
    train_tokenizer([fasta], tmp_path / "t", 100)
    options, found = BuildOptions(context=32, validation_fraction=0.2), []
    for compiler in ("c++", "no-such-compiler"):
        bpe._library.cache_clear()
        monkeypatch.setenv("CXX", compiler)
        assert build_shards([fasta], tmp_path / "t", tmp_path / compiler, options)
        files = sorted(path for path in (tmp_path / compiler).rglob("*") if path.is_file())
        found.append([path.read_bytes() for path in files])
    bpe._library.cache_clear()
    assert found[0] == found[1]
    assert "using `tokenizers`, which is three times slower: no C++ compiler" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_tokens_that_differ_from_those_of_tokenizers_stop_a_build(monkeypatch):
    tokenizer = view_tokenizer(trained(60), trainers.PROTEIN_SPECIAL)
    encoder = Encoder(tokenizer, False)
    monkeypatch.setattr("data_prep.encode._encode", lambda *_: [[3, 4]])
    with pytest.raises(AssertionError, match=r"bpe\.cpp and `tokenizers` encode one differently"):
        encoder.encode([Document("one", "LLAG")])
