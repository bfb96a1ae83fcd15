"""What a tokenizer.json holds besides the map from a text to its tokens changes no shard."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from data_prep.build import BuildOptions, build_shards
from data_prep.encode import Encoder
from data_prep.readers import Document
from data_prep.tokenizer import load_tokenizer, train_tokenizer, view_tokenizer
from s2t2_dist.data.shards import SPLITS, ShardReader, tokenizer_sha256
from s2t2_dist.errors import DataError
from tests.conftest import write_fasta, write_jsonl

OPTIONS = BuildOptions(context=32, validation_fraction=0.3)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "said", "that", "</s>", "<pad>"]


def prose(count=120, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 90))) for _ in range(count)]


def proteins(count=120, seed=0):
    rng = random.Random(seed)
    return {
        f"p{i}": "".join(rng.choices("ACDEFGHIKL", k=rng.randint(1, 200))) for i in range(count)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind: the input, and a tokenizer of this project."""
    folder = tmp_path_factory.mktemp("made")
    fasta = write_fasta(folder / "p.fasta", proteins())
    text = write_jsonl(folder / "t.jsonl", prose())
    train_tokenizer([fasta], folder / "protein", 60)
    train_tokenizer([text], folder / "text", 280)
    return {"protein": (fasta, folder / "protein"), "text": (text, folder / "text")}


def rewritten(source, target, change):
    """A copy of a tokenizer folder whose tokenizer.json `change` has altered."""
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    config = (source / "tokenizer_config.json").read_text()
    (target / "tokenizer_config.json").write_text(config)
    return target


def rows(directory):
    return [[r[: reader.length(i)].tolist() for i, r in enumerate(reader)]
            for reader in (ShardReader(directory, split) for split in SPLITS)]  # fmt: skip


def truncation(length):
    return {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}


def padding(strategy, token="<|padding|>"):
    return {
        "strategy": strategy,
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": token,
    }


SETTINGS = {
    "padding to the longest": {"padding": padding("BatchLongest")},
    "padding to a length": {"padding": padding({"Fixed": 77})},
    "truncation": {"truncation": truncation(8)},
    "both": {"truncation": truncation(16), "padding": padding({"Fixed": 64})},
}


@pytest.mark.parametrize("kind", ["protein", "text"])
@pytest.mark.parametrize("name", SETTINGS)
def test_padding_and_truncation_are_switched_off(tmp_path, made, kind, name, caplog):
    source, plain = made[kind]
    other = rewritten(plain, tmp_path / "t", lambda content: content.update(SETTINGS[name]))
    assert tokenizer_sha256(other) == tokenizer_sha256(plain)
    for tokenizer, target in ((plain, "a"), (other, "b")):
        build_shards([source], tokenizer, tmp_path / target, OPTIONS)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    said = " and ".join(each for each in ("padding", "truncation") if each in SETTINGS[name])
    assert f"{said} of {other / 'tokenizer.json'}: switched off" in caplog.text


def test_padding_that_transformers_saves(tmp_path, made):
    source, plain = made["text"]
    loaded = AutoTokenizer.from_pretrained(plain)
    loaded(prose()[:9], padding=True, truncation=True, max_length=12)
    loaded.save_pretrained(tmp_path / "t")
    assert json.loads((tmp_path / "t" / "tokenizer.json").read_text())["padding"] is not None
    for tokenizer, target in ((plain, "a"), (tmp_path / "t", "b")):
        build_shards([source], tokenizer, tmp_path / target, OPTIONS)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    held = ShardReader(tmp_path / "b", "train").metadata["splits"]["train"]
    tokens = [t for row in rows(tmp_path / "b")[0] for t in row]
    assert tokens.count(loaded.pad_token_id) == 0
    assert tokens.count(loaded.eos_token_id) == held["documents"]


def test_bpe_dropout_is_switched_off(tmp_path, made, caplog):
    source, plain = made["protein"]
    other = rewritten(plain, tmp_path / "t", lambda c: c["model"].update(dropout=0.5))
    for tokenizer, target in ((plain, "a"), (other, "b"), (other, "c")):
        build_shards([source], tokenizer, tmp_path / target, OPTIONS)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") == rows(tmp_path / "c")
    assert "sampling (dropout 0.5)" in caplog.text


def test_unigram_sampling_is_switched_off():
    model = models.Unigram([("<eos>", 0.0), ("A", -1.0), ("C", -1.0), ("AC", -1.5)], None, False)
    model.alpha, model.nbest_size = 0.1, 8
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    loaded = view_tokenizer(backend, {"eos_token": "<eos>"})
    documents = [Document(str(i), "ACAC" * 20) for i in range(50)]
    lengths = Encoder(loaded, characters=False).encode(documents).lengths_D
    assert np.unique(lengths).tolist() == [41]


def not_special(content):
    (end,) = (each for each in content["added_tokens"] if each["id"] == 0)
    end["special"] = False


def not_added(content):
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"]]


@pytest.mark.parametrize("kind", ["protein", "text"])
@pytest.mark.parametrize("change", [not_special, not_added])
def test_an_end_token_that_is_not_special_ends_documents_all_the_same(tmp_path, made, kind, change):
    source, plain = made[kind]
    other = rewritten(plain, tmp_path / "t", change)
    for tokenizer, target in ((plain, "a"), (other, "b")):
        build_shards([source], tokenizer, tmp_path / target, OPTIONS)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def encoder(backend, end="<eos>"):
    return Encoder(view_tokenizer(backend, {"eos_token": end}), characters=False)


def letters(*merges, **options):
    tokens = ["<eos>", "<cls>", "A", "C", "S", "s", "a", *map("".join, merges)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(merges), **options))
    backend.add_special_tokens(["<eos>", "<cls>"])
    backend.decoder = decoders.Fuse()
    return backend


def test_tokens_that_stand_for_no_text_are_found():
    """A backend whose library adds a token is no map from text to tokens."""
    backend = letters()
    backend.pre_tokenizer = pre_tokenizers.Digits()  # so that bpe.cpp is not used
    made = encoder(backend)
    backend.enable_padding(pad_id=1, pad_token="<cls>", length=2)  # behind its back
    with pytest.raises(DataError, match="two: the tokenizer adds the token '<cls>'"):
        made.encode([Document("one", "AC"), Document("two", "A")])


def test_a_post_processor_adds_nothing():
    backend = letters()
    backend.post_processor = processors.TemplateProcessing("<cls> $A", None, [("<cls>", 1)])
    found = encoder(backend).encode([Document("one", "AC")])
    assert found.tokens_N.tolist() == [2, 3, 0]


def test_an_end_token_that_text_contains_is_refused():
    with pytest.raises(DataError, match="one: the tokenizer writes its end token 'S' for text"):
        encoder(letters(), "S").encode([Document("one", "ASC")])


@pytest.mark.parametrize(
    ("normalizer", "text", "message"),
    [
        (normalizers.Lowercase(), "AsS", "'A' becomes 'a'"),
        (normalizers.Replace("S", "s"), "AsS", "'S' becomes 's'"),
        (normalizers.Replace("AC", "SS"), "SAC", "tokens do not spell its text"),
        (normalizers.Prepend("C"), "SA", "'S' becomes 'CS'"),
    ],
)
def test_what_a_normalizer_does_is_said_as_it_is(normalizer, text, message):
    backend = letters()
    backend.normalizer = normalizer
    with pytest.raises(DataError, match=message):
        encoder(backend).encode([Document("one", text)])


def test_a_normalizer_is_not_called_a_lack_of_the_alphabet(tmp_path, made):
    """The tokenizer has every residue, but none in lower case; the error names the file too."""
    source, plain = made["protein"]
    lower = rewritten(plain, tmp_path / "t", lambda c: c.update(normalizer={"type": "Lowercase"}))
    message = r"p\.fasta: document p\d+: its tokens do not spell its text: '(.)' becomes '(?i:\1)'"
    with pytest.raises(DataError, match=message):
        build_shards([source], lower, tmp_path / "d", OPTIONS)


def test_the_settings_stay_in_the_copied_tokenizer(tmp_path, made):
    source, plain = made["text"]
    other = rewritten(plain, tmp_path / "t", lambda content: content.update(SETTINGS["both"]))
    build_shards([source], other, tmp_path / "d", OPTIONS)
    copied = (tmp_path / "d" / "tokenizer" / "tokenizer.json").read_bytes()
    assert copied == (other / "tokenizer.json").read_bytes()
    assert load_tokenizer(tmp_path / "d" / "tokenizer").backend.padding is None
