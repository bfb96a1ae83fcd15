"""`data build` read back: nothing lost, nothing in file order, the split by id alone."""

import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_prep.build import BuildOptions, build_shards, is_validation
from data_prep.readers import RARE_RESIDUES, RESIDUES, id_hash
from data_prep.tokenizer import train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS, ShardReader, tokenizer_sha256
from s2t2_dist.errors import ArtifactError, DataError
from tests.conftest import write_fasta, write_jsonl

OPTIONS = BuildOptions(context=32, validation_fraction=0.3)


def proteins(count=200, seed=0):
    rng = random.Random(seed)
    letters = RESIDUES * 20 + RARE_RESIDUES
    return {f"UniRef50_{seed}_{i}": "".join(rng.choices(letters, k=20 + i)) for i in range(count)}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_fasta(tmp_path_factory.mktemp("fasta") / "p.fasta", proteins())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, fasta):
    target = tmp_path_factory.mktemp("tokenizer") / "protein"
    train_tokenizer([fasta], target, 120)
    return target


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = write_jsonl(directory / "t.jsonl", ["the cat sat on the mat, said the cat"] * 50)
    train_tokenizer([texts], directory / "text", 265)
    return directory / "text"


def read_back(directory, split):
    """The documents of a split, decoded by the library from the rows; the last row unpadded."""
    reader = ShardReader(directory, split)
    library = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    ids = np.concatenate([reader[i][: reader.length(i)] for i in range(len(reader))])
    ends = np.flatnonzero(ids == reader.metadata["eos_token_id"])
    assert ends[-1] == len(ids) - 1
    documents = np.split(ids, ends[:-1] + 1)
    return [library.decode(d[:-1].tolist(), skip_special_tokens=False) for d in documents]


@pytest.mark.parametrize("characters", [False, True])
def test_rows_hold_every_document_in_hash_order(tmp_path, fasta, tokenizer, characters):
    options = BuildOptions(context=32, validation_fraction=0.3, characters=characters, seed=5)
    assert build_shards([fasta], tokenizer, tmp_path / "d", options)
    by_hash = sorted(proteins().items(), key=lambda item: id_hash(item[0], "order 5"))
    for split in SPLITS:
        validation = split == "validation"
        expected = [text for name, text in by_hash if is_validation(name, 0.3) == validation]
        assert read_back(tmp_path / "d", split) == expected
        assert 0 < len(expected) < len(by_hash)


def test_counts_in_the_manifest(tmp_path, fasta, tokenizer):
    build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)
    for split in SPLITS:
        reader = ShardReader(tmp_path / "d", split)
        texts = read_back(tmp_path / "d", split)
        held = reader.metadata["splits"][split]
        lengths = [reader.length(i) for i in range(len(reader))]
        assert held["documents"] == len(texts)
        assert held["bytes"] == sum(map(len, texts))
        assert held["byte_counts"] == Counter("".join(texts))
        assert held["tokens"] == sum(lengths)
        assert held["rows"] == len(lengths) == -(-held["tokens"] // 32)
        covered = sum(reader.token_bytes[r[:n]].sum() for r, n in zip(reader, lengths, strict=True))
        assert covered == held["bytes"]
        starts = sum(len(reader.document_starts(i)) for i in range(len(reader)))
        assert starts == held["documents"]
    assert reader.token_bytes.dtype == np.int64
    assert reader.metadata["tokenizer_sha256"] == tokenizer_sha256(tmp_path / "d" / "tokenizer")


def test_characters_are_one_token_each(tmp_path, fasta, tokenizer):
    build_shards([fasta], tokenizer, tmp_path / "d", BuildOptions(32, 0.3, characters=True))
    held = ShardReader(tmp_path / "d", "train").metadata["splits"]["train"]
    assert held["tokens"] == held["bytes"] + held["documents"]


def test_input_order_does_not_matter(tmp_path, fasta, tokenizer):
    reverse = write_fasta(tmp_path / "r.fasta", dict(reversed(proteins().items())))
    build_shards([fasta], tokenizer, tmp_path / "a", OPTIONS)
    build_shards([reverse], tokenizer, tmp_path / "b", OPTIONS)
    for split in SPLITS:
        a, b = (ShardReader(tmp_path / name, split) for name in "ab")
        assert np.array_equal(np.stack(list(a)), np.stack(list(b)))


def test_the_same_build_gives_the_same_bytes(tmp_path, fasta, tokenizer):
    build_shards([fasta], tokenizer, tmp_path / "a", OPTIONS)
    build_shards([fasta], tokenizer, tmp_path / "b", OPTIONS)
    assert artifacts.read_manifest(tmp_path / "a") == artifacts.read_manifest(tmp_path / "b")


def test_split_depends_on_the_id_alone(tmp_path, tokenizer):
    more = write_fasta(tmp_path / "more.fasta", proteins() | proteins(50, seed=1))
    options = BuildOptions(context=32, validation_fraction=0.3, seed=9)
    build_shards([more], tokenizer, tmp_path / "d", options)
    held_out = {text for name, text in proteins().items() if is_validation(name, 0.3)}
    assert held_out < set(read_back(tmp_path / "d", "validation"))
    assert held_out.isdisjoint(read_back(tmp_path / "d", "train"))


def test_split_fraction():
    ids = [f"UniRef50_{i}" for i in range(20_000)]
    held_out = {i for i in ids if is_validation(i, 0.05)}
    # Binomial: 1000 expected, standard deviation 31; five of them.
    assert abs(len(held_out) - 1000) < 155
    # No document changes sides between versions; these were drawn by the first one.
    first = [number for number in range(100) if f"UniRef50_{number}" in held_out]
    assert first == [7, 9, 17, 18, 20, 29, 53, 64]
    # A larger fraction only adds documents.
    assert held_out < {i for i in ids if is_validation(i, 0.06)}


def test_text_with_special_tokens_written_out(tmp_path, text_tokenizer):
    texts = [f"{i} <|endoftext|> e\u0301 \N{SNOWMAN}\n\n <|padding|> {i}" for i in range(40)]
    source = write_jsonl(tmp_path / "x.jsonl", texts)
    build_shards([source], text_tokenizer, tmp_path / "d", OPTIONS)
    back = read_back(tmp_path / "d", "train") + read_back(tmp_path / "d", "validation")
    assert sorted(back) == sorted(texts)


def save_bpe(directory, unk):
    """A tokenizer of the 20 residues alone, as another tool may have made it."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *([unk] if unk else []), *RESIDUES])}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token=unk))
    model.decoder = decoders.Fuse()
    model.add_special_tokens(["<eos>", *([unk] if unk else [])])
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return directory


@pytest.mark.parametrize("unk", [None, "<unk>"])
@pytest.mark.parametrize("characters", [False, True])
def test_a_letter_that_the_alphabet_lacks(tmp_path, unk, characters):
    # Without an unknown token the library drops the letter and says nothing.
    small = save_bpe(tmp_path / "t", unk)
    source = write_fasta(tmp_path / "p.fasta", {"good": "ACD", "bad": "ACXD"})
    with pytest.raises(DataError, match=r"no .*'X'"):
        build_shards([source], small, tmp_path / "d", BuildOptions(32, 0.5, characters))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.fasta", "t"]


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, text_tokenizer):
    changed = Tokenizer.from_file(str(text_tokenizer / "tokenizer.json"))
    changed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    (tmp_path / "t").mkdir()
    changed.save(str(tmp_path / "t" / "tokenizer.json"))
    config = (text_tokenizer / "tokenizer_config.json").read_text()
    (tmp_path / "t" / "tokenizer_config.json").write_text(config)
    source = write_jsonl(tmp_path / "x.jsonl", ["one", "two", "three", "four"])
    with pytest.raises(DataError, match=r"tokens do not spell its text|alphabet has no"):
        build_shards([source], tmp_path / "t", tmp_path / "d", OPTIONS)


def test_characters_of_several_tokens_are_refused(tmp_path, text_tokenizer):
    source = write_jsonl(tmp_path / "x.jsonl", ["caf\u00e9"])
    with pytest.raises(DataError, match="no single token for the character 'é'"):
        build_shards([source], text_tokenizer, tmp_path / "d", BuildOptions(32, 0.5, True))


def test_building_again_is_recognised_and_other_options_are_refused(tmp_path, fasta, tokenizer):
    assert build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS) is True
    before = artifacts.read_manifest(tmp_path / "d")
    assert build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS) is False
    with pytest.raises(ArtifactError, match="made with another context"):
        build_shards([fasta], tokenizer, tmp_path / "d", BuildOptions(64, 0.3))
    assert artifacts.verify(tmp_path / "d") == before
    (tmp_path / "d" / "COMPLETE").unlink()
    with pytest.raises(ArtifactError, match="was not finished"):
        build_shards([fasta], tokenizer, tmp_path / "d", OPTIONS)


def test_a_split_without_documents(tmp_path, tokenizer):
    source = write_fasta(tmp_path / "p.fasta", {"only": "ACDEFG"})
    with pytest.raises(DataError, match="none of the 1 documents falls into validation"):
        build_shards([source], tokenizer, tmp_path / "d", BuildOptions(32, 1e-9))


@pytest.mark.parametrize(("context", "fraction"), [(1, 0.5), (32, 0.0), (32, 1.0), (32, -1.0)])
def test_impossible_options(context, fraction):
    with pytest.raises(DataError, match=r"context of 1 |validation fraction of "):
        BuildOptions(context, fraction)


def test_a_model_folder_lends_only_its_tokenizer(tmp_path, fasta, tokenizer):
    model = tmp_path / "model"
    model.mkdir()
    for path in tokenizer.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "model.safetensors").write_bytes(b"weights")
    build_shards([fasta], model, tmp_path / "d", OPTIONS)
    copied = sorted(path.name for path in (tmp_path / "d" / "tokenizer").iterdir())
    assert copied == ["tokenizer.json", "tokenizer_config.json"]
