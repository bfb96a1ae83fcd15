"""Tokenizers: what they give back, that they are deterministic, and how the sample is drawn."""

import json
import random
from collections import Counter
from itertools import accumulate, pairwise, permutations

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from data_prep.readers import RARE_RESIDUES, RESIDUES, Document, id_hash
from data_prep.tokenizer import load_tokenizer, sample_documents, train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.shards import tokenizer_sha256
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
