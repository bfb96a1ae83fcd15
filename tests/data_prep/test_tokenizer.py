"""Tokenizers: what they give back, that they are deterministic, and how the sample is drawn."""

import json
import random
from collections import Counter
from itertools import accumulate, pairwise, permutations

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from data_prep import trainers
from data_prep.readers import RARE_RESIDUES, RESIDUES, Document, id_hash
from data_prep.statistics import statistics_of, sweep
from data_prep.tokenizer import load_tokenizer, sample_documents, train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import tokenizer_sha256
from s2t2_dist.errors import ArtifactError, DataError
from tests.conftest import write_fasta, write_jsonl

PROSE = [
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "def f(x):\n    return x  # the identity\n\n\ttabs\tand  spaces ",
    "<|endoftext|> written out is text, and so is <|padding|>.",
    "Accents: e\u0301 is not \u00e9. Emoji: \N{SNOWMAN}\U0001f600. Nul: \x00.",
]


def proteins(count=300, seed=0):
    """Sequences with a planted motif, so that one pair is the most frequent."""
    rng = random.Random(seed)
    return {
        f"p{i}": "".join(rng.choice([*RESIDUES, "WC", "WC", "GHK"]) for _ in range(60))
        for i in range(count)
    }


@pytest.fixture(scope="module")
def protein_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    fasta = write_fasta(directory / "p.fasta", proteins())
    assert train_tokenizer([fasta], directory / "protein", 80)
    return directory / "protein"


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    texts = write_jsonl(directory / "t.jsonl", [f"{text} {i}" for text in PROSE for i in range(9)])
    assert train_tokenizer([texts], directory / "text", 300)
    return directory / "text"


def test_protein_tokenizer_loads_in_transformers_and_joins_without_spaces(protein_dir):
    tokenizer = AutoTokenizer.from_pretrained(protein_dir)
    special = [tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert special == ["<eos>", "<pad>", "<unk>"]
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    assert len(tokenizer) == 80
    for text in [*proteins(20, seed=1).values(), RESIDUES + RARE_RESIDUES]:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) < len(text) or text.endswith(RARE_RESIDUES)
        assert tokenizer.decode(ids) == text
    assert tokenizer("AC#D")["input_ids"].count(2) == 1  # unknown is visible, not dropped


def test_text_tokenizer_loads_in_transformers_and_gives_every_text_back(text_dir):
    tokenizer = AutoTokenizer.from_pretrained(text_dir)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|padding|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    for text in [*PROSE, "unseen \u4e2d\u6587"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_first_merge_is_the_most_frequent_pair(protein_dir):
    pairs = Counter(a + b for text in proteins().values() for a, b in pairwise(text))
    merges = json.loads((protein_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert "".join(merges[0]) == pairs.most_common(1)[0][0]


def test_same_input_same_bytes_in_any_file_order(tmp_path, protein_dir):
    halves = [dict(list(proteins().items())[half::2]) for half in (0, 1)]
    files = [write_fasta(tmp_path / f"{i}.fa", half) for i, half in enumerate(halves)]
    train_tokenizer(files, tmp_path / "one", 80)
    train_tokenizer(files[::-1], tmp_path / "two", 80)
    hashes = {tokenizer_sha256(d) for d in (tmp_path / "one", tmp_path / "two", protein_dir)}
    assert len(hashes) == 1


def test_training_again_is_recognised_and_other_options_are_refused(tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", proteins())
    assert train_tokenizer([fasta], tmp_path / "t", 60) is True
    before = artifacts.sha256_file(tmp_path / "t" / "manifest.json")
    assert train_tokenizer([fasta], tmp_path / "t", 60) is False
    with pytest.raises(ArtifactError, match="made with another vocab_size"):
        train_tokenizer([fasta], tmp_path / "t", 61)
    write_fasta(fasta, proteins(seed=5))
    with pytest.raises(ArtifactError, match="made with another sources"):
        train_tokenizer([fasta], tmp_path / "t", 60)
    assert artifacts.sha256_file(tmp_path / "t" / "manifest.json") == before


def test_vocabulary_that_the_data_cannot_fill(tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", {"a": "ACACACDEDEDE"})
    with pytest.raises(DataError, match=r"yield only 3\d tokens, 512 were asked"):
        train_tokenizer([fasta], tmp_path / "t", 512)
    with pytest.raises(DataError, match=r"vocabulary of 28 is too small: .* are 29"):
        train_tokenizer([fasta], tmp_path / "t", 28)
    assert list(tmp_path.iterdir()) == [fasta]


def test_fasta_and_text_do_not_mix(tmp_path):
    files = [
        write_fasta(tmp_path / "p.fasta", proteins()),
        write_jsonl(tmp_path / "t.jsonl", PROSE),
    ]
    with pytest.raises(DataError, match="mix FASTA and text"):
        train_tokenizer(files, tmp_path / "t", 300)


@pytest.mark.parametrize("characters", range(1, 10))
def test_sample_is_the_prefix_in_hash_order(characters):
    documents = [Document(f"d{i}", "A" * length) for i, length in enumerate([1, 2, 1, 3, 1])]
    ordered = sorted(documents, key=lambda document: id_hash(document.id, "sample"))
    totals = accumulate(len(document.text) for document in ordered)
    kept = sum(total <= characters for total in totals)
    # One document is kept even where it is longer than that.
    expected = ordered[: max(kept, 1)]
    assert all(sample_documents(p, characters) == expected for p in permutations(documents))


def test_sample_option_limits_what_is_trained_on(tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", proteins())
    train_tokenizer([fasta], tmp_path / "t", 40, sample=2000)
    trained_on = artifacts.read_manifest(tmp_path / "t")["trained_on"]
    assert 1900 < trained_on["characters"] <= 2000


@pytest.mark.parametrize("kind", ["protein", "text"])
def test_token_texts_spell_what_was_encoded(kind, request):
    loaded = load_tokenizer(request.getfixturevalue(f"{kind}_dir"))
    for text in PROSE if kind == "text" else proteins(20, seed=2).values():
        ids = loaded.backend.encode(text, add_special_tokens=False).ids
        assert b"".join(loaded.token_texts[i] for i in ids) == text.encode()
    assert loaded.token_texts[loaded.eos_token_id] == loaded.token_texts[loaded.pad_token_id] == b""
    assert loaded.vocab_size == len(loaded.token_texts)


def test_every_byte_has_its_token(text_dir):
    single = [text for text in load_tokenizer(text_dir).token_texts if len(text) == 1]
    assert sorted(single) == [bytes([byte]) for byte in range(256)]


def test_pad_falls_back_to_eos_and_a_token_may_be_an_object(tmp_path, text_dir):
    tokenizer_json = (text_dir / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    config = {"eos_token": {"content": "<|endoftext|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_token_id == loaded.pad_token_id == 0


def test_bad_tokenizer_folders(tmp_path, text_dir):
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text((text_dir / "tokenizer.json").read_text())
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="names no eos_token"):
        load_tokenizer(tmp_path)
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    with pytest.raises(DataError, match="decoder"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_sentencepiece_proteins_cut_as_sentencepiece_cuts(tmp_path, algorithm, monkeypatch):
    learned = []
    real = trainers._learn_pieces

    def remember(*arguments):
        learned.append(real(*arguments))
        return learned[-1]

    monkeypatch.setattr(trainers, "_learn_pieces", remember)
    fasta = write_fasta(tmp_path / "p.fasta", proteins())
    train_tokenizer([fasta], tmp_path / "t", 80, kind="sentencepiece", algorithm=algorithm)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(tokenizer) == 80
    assert [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    scores = dict(learned[0])
    for text in [*proteins(50, seed=1).values(), RESIDUES + RARE_RESIDUES]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if algorithm == "bpe":
            assert pieces == merge_by_score(text, scores)
        else:  # ties between equal sums may fall either way; scores have 24 bits
            assert sum(scores[p] for p in pieces) == pytest.approx(best_sum(text, scores), rel=1e-5)
    assert tokenizer("AC#D")["input_ids"].count(2) == 1


def merge_by_score(text, scores):
    """SentencePiece's BPE, from its definition: always the neighbours with the best piece."""
    parts = list(text)
    while True:
        joined = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        best = max((each for each in joined if each[0] is not None), default=None)
        if best is None:
            return parts
        i = -best[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def best_sum(text, scores):
    """The unigram model's best segmentation, by dynamic programming."""
    best = [0.0] + [float("-inf")] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(max(0, end - 32), end):
            if text[start:end] in scores:
                best[end] = max(best[end], best[start] + scores[text[start:end]])
    return best[-1]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_sentencepiece_text_gives_every_text_back(tmp_path, algorithm):
    texts = [f"{text} {i}" for text in PROSE for i in range(40)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    train_tokenizer([source], tmp_path / "t", 275, kind="sentencepiece", algorithm=algorithm)
    loaded = load_tokenizer(tmp_path / "t")
    for text in [*PROSE, "unseen \u4e2d\u6587 \u2581 under"]:
        ids = loaded.backend.encode(text, add_special_tokens=False).ids
        assert b"".join(loaded.token_texts[i] for i in ids) == text.encode()
        assert AutoTokenizer.from_pretrained(tmp_path / "t").decode(ids) == text
    assert loaded.vocab_size == 275


def test_sentencepiece_mistakes(tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", {"a": "ACACACDEDEDE"})
    with pytest.raises(DataError, match=r"SentencePiece cannot make 5.. pieces"):
        train_tokenizer([fasta], tmp_path / "t", 512, kind="sentencepiece", algorithm="unigram")
    with pytest.raises(DataError, match="--kind sentencepiece"):
        train_tokenizer([fasta], tmp_path / "t", 40, algorithm="unigram")


def test_statistics_count_every_token(tmp_path, protein_dir):
    fasta = write_fasta(tmp_path / "p.fasta", proteins(20, seed=3))
    found = statistics_of(protein_dir, [fasta], 10**9)
    tokenizer = AutoTokenizer.from_pretrained(protein_dir)
    counts = Counter(i for t in proteins(20, seed=3).values() for i in tokenizer(t)["input_ids"])
    assert {i: n for i, n in enumerate(found.counts_V.tolist()) if n} == counts
    assert found.characters_per_token == found.characters / counts.total()
    assert found.counts_V[found.most_used[0]] == max(counts.values())
    assert len(found.texts[found.longest[0]]) == max(map(len, found.texts))
    assert all(counts[i] == 0 and found.texts[i] for i in found.unused)


def test_sweep_compresses_more_with_more_tokens(tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", proteins())
    found = sweep([fasta], [32, 64, 128], "bpe", "bpe", 10**9)
    rates = [found[size].characters_per_token for size in (32, 64, 128)]
    assert 1 < rates[0] < rates[1] < rates[2]
    assert [len(found[size].texts) for size in (32, 64, 128)] == [32, 64, 128]
    # Measured on every fifth document of the sample, in hash order.
    documents = sample_documents((Document(*item) for item in proteins().items()), 10**9)
    assert found[64].characters == sum(len(document.text) for document in documents[::5])


@pytest.mark.slow
def test_sizes_from_32_to_32768(tmp_path):
    rng = random.Random(0)
    motifs = ["".join(rng.choices(RESIDUES, k=6)) for _ in range(30_000)]
    texts = {f"p{i}": "".join(rng.choices(motifs, k=60)) for i in range(3000)}
    fasta = write_fasta(tmp_path / "p.fasta", texts)
    for size in (32, 32_768):
        assert train_tokenizer([fasta], tmp_path / str(size), size)
        assert load_tokenizer(tmp_path / str(size)).vocab_size == size
