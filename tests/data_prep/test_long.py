"""Long records: cut where the tokens stay those of the whole, in bounded memory and time."""

import functools
import itertools
import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_prep import cuts, encode, trainers
from data_prep.bpe import _library
from data_prep.cuts import Cuts, cut
from data_prep.encode import Encoder
from data_prep.readers import RESIDUES, Document, ReadOptions, read_documents
from data_prep.tokenizer import read_sample, train_tokenizer, view_tokenizer
from s2t2_dist.errors import DataError

LLAMA = (
    r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = ["the", "kinase", "it's", "3.14", "x1", "(", ")", "\n", "\n\n", "  ", "\t", "_", "!"]
WORDS += ["\u00e9t\u00e9", "don't"]


def prose(count, seed=0):
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + " " * rng.choice([0, 1, 1, 1, 2, 3]) for _ in range(count))


def proteins(count, seed=0):
    return "".join(random.Random(seed).choices(RESIDUES, k=count))


@functools.cache
def protein_tokenizer(kind="bpe", algorithm="bpe", size=120):
    texts = [proteins(200, seed) for seed in range(400)]
    return trainers.train(texts, size, True, kind, algorithm)


def text_tokenizer(words=None):
    backend = trainers.train([prose(200, seed) for seed in range(60)], 300, False, "bpe", "bpe")
    if words is not None:
        backend.pre_tokenizer = words
    return backend


def llama():
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


MADE = {
    "protein": lambda: (protein_tokenizer(), trainers.PROTEIN_SPECIAL, proteins),
    "protein by SentencePiece": lambda: (
        protein_tokenizer("sentencepiece"), trainers.PROTEIN_SPECIAL, proteins,
    ),
    "protein unigram": lambda: (
        protein_tokenizer("sentencepiece", "unigram"), trainers.PROTEIN_SPECIAL, proteins,
    ),
    "GPT-2": lambda: (text_tokenizer(), trainers.TEXT_SPECIAL, prose),
    "Llama 3": lambda: (text_tokenizer(llama()), trainers.TEXT_SPECIAL, prose),
}  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Pieces of 500 characters."""
    for module in (cuts, encode):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 500)
        monkeypatch.setattr(module, "LONGEST_PIECE", 5000)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 900)
    monkeypatch.setattr(encode, "CHECKED_CHARACTERS", 100)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("characters", [False, True])
def test_pieces_have_the_tokens_of_the_whole(name, compiled, characters, short, monkeypatch):
    if not compiled:
        monkeypatch.setattr("data_prep.bpe._library", lambda: None)
    backend, special, make = MADE[name]()
    loaded = view_tokenizer(backend, special)
    lengths = [20_000, 499, 500, 501, 10, 3000, 1]
    texts = [make(length, seed) for seed, length in enumerate(lengths)]
    if characters:
        texts = [text.replace("\u00e9", "e") for text in texts]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    pieces = cut(documents[0], Cuts(loaded, characters))
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == texts[0]
    found = Encoder(loaded, characters).encode(documents)
    whole = [list(text) if characters else [text] for text in texts]
    expected = [
        [i for part in parts for i in backend.encode(part, add_special_tokens=False).ids]
        for parts in whole
    ]
    assert found.lengths_D.tolist() == [len(ids) + 1 for ids in expected]
    assert found.tokens_N.tolist() == [i for ids in expected for i in [*ids, loaded.eos_token_id]]


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(*[st.sampled_from(["A", "C", "D", "AA", "AC", "DA", "AAA", "ACA"])] * 2),
        unique=True,
        max_size=8,
    ),
    st.text(alphabet="ACD", min_size=2, max_size=40),
)
def test_a_cut_of_random_rules_changes_no_token(merges, text):
    tokens = dict.fromkeys(["<eos>", "A", "C", "D"])
    tokens.update(dict.fromkeys(t for pair in merges for t in (*pair, "".join(pair))))
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.Fuse()
    places = Cuts(view_tokenizer(backend, {"eos_token": "<eos>"}), characters=False)
    whole = backend.encode(text).ids
    for first in range(1, len(text)):
        place = places.next_cut(text, first, len(text))
        if place is not None:
            assert backend.encode(text[:place]).ids + backend.encode(text[place:]).ids == whole


@pytest.mark.slow
@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.sampled_from([*WORDS, " ", " ", "a", "\u0301", "A"]), min_size=2, max_size=30))
def test_a_cut_between_words_changes_no_word(parts):
    text = "".join(parts)
    for words in (pre_tokenizers.ByteLevel(False), llama()):
        SHARED.pre_tokenizer = words
        places = Cuts(view_tokenizer(SHARED, trainers.TEXT_SPECIAL), characters=False)
        whole = [word for word, _ in words.pre_tokenize_str(text)]
        for first in range(1, len(text)):
            place = places.next_cut(text, first, len(text))
            if place is not None:
                halves = (text[:place], text[place:])
                assert [w for half in halves for w, _ in words.pre_tokenize_str(half)] == whole


SHARED = text_tokenizer()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: t.add_tokens([AddedToken("end of", special=False)]),
    ],
)
def test_a_tokenizer_that_may_look_further_is_cut_nowhere(change):
    backend = text_tokenizer()
    change(backend)
    places = Cuts(view_tokenizer(backend, trainers.TEXT_SPECIAL), characters=False)
    assert places.next_cut("the end of the cat", 1, 18) is None


def test_a_document_that_cannot_be_cut_is_refused(short):
    loaded = view_tokenizer(text_tokenizer(), trainers.TEXT_SPECIAL)
    with pytest.raises(DataError, match=r"one: 9,000 characters, and no place in 5,000 of them"):
        Encoder(loaded, False).encode([Document("one", "x" * 9000)])
    assert Encoder(loaded, False).encode([Document("one", "x" * 5000)]).lengths_D[0] > 1


# To within a block of 1 MB, as the file is read.
@pytest.mark.parametrize("length", [(3 << 20) + 1, 4 << 20, 9 << 20])
@pytest.mark.parametrize("before", [b"", b">short\nAC\n"])
@pytest.mark.parametrize("after", [b"", b"\n>last\nAC\n"])
def test_the_limit_of_a_record_holds_at_any_length(tmp_path, monkeypatch, length, before, after):
    monkeypatch.setattr("data_prep.sources.LONGEST_DOCUMENT", 1 << 21)
    path = tmp_path / "x.fasta"
    path.write_bytes(before + b">a\n" + b"A" * length + after)
    with pytest.raises(DataError, match="a document is longer than 2,097,152 bytes"):
        list(read_documents([path]))
    path.write_bytes(before + b">a\n" + b"A" * ((1 << 21) - 5) + after)
    assert (1 << 21) - 5 in [len(document.text) for document in read_documents([path])]


def test_long_words_are_cut_for_the_trainer_and_no_others():
    text = prose(3000) + " " + "x" * 70_000 + " " + prose(10)
    pieces = list(trainers._cut_words([text, "short", "y" * 60_000]))
    assert "".join(pieces) == text + "short" + "y" * 60_000
    assert pieces[-2:] == ["short", "y" * 60_000]
    assert max(len(run) for piece in pieces[:-2] for run in re.findall(r"\S+", piece)) <= 1024
    for before, after in itertools.pairwise(pieces[:-2]):
        assert not before[-1].isspace() and not after[0].isspace()


def test_long_runs_of_blanks_are_cut_too():
    text = "a" + " \n\t" * 30_000 + "b" + " " * 60_000 + "c"
    pieces = list(trainers._cut_words([text]))
    assert "".join(pieces) == text
    assert max(len(run) for piece in pieces[:-1] for run in re.findall(r"\s+", piece)) <= 1024
    assert pieces[-1].endswith("b" + " " * 60_000 + "c")


@pytest.mark.slow
def test_a_long_run_of_blanks_trains_in_seconds(tmp_path):
    rows = ["word and word " * 50, "x" + " " * 1_000_000 + "y"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    begin = time.monotonic()
    assert train_tokenizer([tmp_path / "x.jsonl"], tmp_path / "t", 262)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_one_record_of_two_million_residues_trains_in_seconds(tmp_path):
    (tmp_path / "x.fasta").write_text(f">long\n{proteins(2_000_000)}\n")
    begin = time.monotonic()
    assert train_tokenizer([tmp_path / "x.fasta"], tmp_path / "t", 512)
    assert time.monotonic() - begin < 60  # it did not end in an hour; about 5 s on a calm machine


def test_the_sample_of_a_longer_record_is_its_beginning(tmp_path, caplog):
    (tmp_path / "x.fasta").write_text(f">long\n{proteins(5000)}\n")
    (document,) = read_sample([tmp_path / "x.fasta"], 1000, ReadOptions()).documents
    assert document.text == proteins(5000)[:1000]
    assert "document long has 5,000 characters; the sample is its first 1,000" in caplog.text


def test_the_compiled_library_is_there():
    """Otherwise the tests above compare `tokenizers` with itself."""
    assert _library() is not None
