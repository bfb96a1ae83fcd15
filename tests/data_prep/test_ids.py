"""Ids: none is invented, shared ones are told, and every option belongs to the request."""

import json
import random

import pytest

from data_prep.build import BuildOptions, build_shards
from data_prep.ids import FEW_SHARED, SharedIds, id_hash, require_few_shared, text_id
from data_prep.listing import split_ids
from data_prep.parts import Documents, find_shared, write_part
from data_prep.readers import RESIDUES, ReadOptions, read_documents
from data_prep.statistics import statistics_of, sweep
from data_prep.tokenizer import sample_documents, train_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.cli import run
from s2t2_dist.errors import ArtifactError, DataError
from tests.conftest import write_fasta

HASH = ReadOptions(id_field="")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count=200, seed=0):
    rng = random.Random(seed)
    words = ["kinase", "domain", "binds", "the", "protein", "cat"]
    return [f"{i} " + " ".join(rng.choices(words, k=12)) for i in range(count)]


def proteins(count=300, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(RESIDUES, k=60)) for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tokenizers by kind."""
    folder = tmp_path_factory.mktemp("made")
    train_tokenizer(
        [write_rows(folder / "t.jsonl", [{"text": t} for t in texts()])], folder / "t", 270
    )
    named = {f"p{i}": text for i, text in enumerate(proteins())}
    train_tokenizer([write_fasta(folder / "p.fasta", named)], folder / "p", 60)
    return folder


@pytest.mark.parametrize("value", [None, "", "  ", float("nan")])
def test_an_id_that_says_nothing_is_none(tmp_path, value):
    path = write_rows(tmp_path / "x.jsonl", [{"id": value, "text": text} for text in texts()])
    documents = list(read_documents([path]))
    assert [document.id for document in documents] == [text_id(text) for text in texts()]


@pytest.mark.parametrize(("value", "expected"), [(7, "7"), (1.5, "1.5"), ("x y", "x y"), (0, "0")])
def test_an_id_is_text_or_a_number(tmp_path, value, expected):
    path = write_rows(tmp_path / "x.jsonl", [{"id": value, "text": "a"}])
    assert next(read_documents([path])).id == expected


@pytest.mark.parametrize("value", [True, ["a"], {"$oid": "6"}])
def test_an_id_of_another_type_is_refused(tmp_path, value):
    path = write_rows(tmp_path / "x.jsonl", [{"id": value, "text": "a"}])
    with pytest.raises(DataError, match=r"x\.jsonl line 1: the id field 'id' is neither"):
        list(read_documents([path]))


def test_another_id_field(tmp_path):
    rows = [{"id": "same", "key": i, "text": text} for i, text in enumerate(texts(5))]
    path = write_rows(tmp_path / "x.jsonl", rows)
    named = list(read_documents([path], ReadOptions(id_field="key")))
    assert [document.id for document in named] == list("01234")
    assert [d.id for d in read_documents([path], HASH)] == [text_id(text) for text in texts(5)]
    with pytest.raises(DataError, match="line 1: the id field 'uuid' is missing"):
        list(read_documents([path], ReadOptions(id_field="uuid")))


def test_fasta_ids_that_are_not_utf8_stay_apart(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_bytes(b">prot\xe9ine\nAC\n>prot\xe8ine\nAC\n")
    assert len({document.id for document in read_documents([path])}) == 2


def few_words(path):
    """Headers whose first word many records share, as `>Protein 7`."""
    words = ["Protein", "Putative", "Uncharacterized"]
    rng = random.Random(1)
    records = (f">{rng.choice(words)} {i}\n{text}\n" for i, text in enumerate(proteins()))
    path.write_text("".join(records))
    return path


SHARED = [
    lambda folder: few_words(folder / "x.fasta"),
    lambda folder: write_rows(folder / "x.jsonl", [{"id": "doc", "text": t} for t in texts()]),
    lambda folder: write_rows(
        folder / "x.jsonl", [{"id": i % 150, "text": t} for i, t in enumerate(texts())]
    ),
]


@pytest.mark.parametrize("write", SHARED)
def test_shared_ids_are_refused_everywhere(tmp_path, made, write):
    path = write(tmp_path)
    tokenizer = made / ("p" if path.suffix == ".fasta" else "t")
    example = "'Pr|'Pu|'Un" if path.suffix == ".fasta" else "'doc'|'[0-9]+'"
    message = rf"documents have the id of another one, such as ({example}).*--id-field ''"
    with pytest.raises(DataError, match=message):
        build_shards([path], tokenizer, tmp_path / "d", BuildOptions(32, 0.1))
    with pytest.raises(DataError, match=message):
        train_tokenizer([path], tmp_path / "t", 60 if path.suffix == ".fasta" else 270)
    with pytest.raises(DataError, match=message):
        sample_documents(read_documents([path]), 4000)
    with pytest.raises(DataError, match=message):
        list(split_ids([path], "train", 0.1, ReadOptions()))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    # By the hash of the text it goes: the share that was asked for, and all documents.
    assert build_shards([path], tokenizer, tmp_path / "d", BuildOptions(32, 0.1, read=HASH))
    manifest = artifacts.read_manifest(tmp_path / "d")
    count = len(list(read_documents([path])))
    held = manifest["splits"]["validation"]["documents"]
    assert abs(held - count / 10) < 5 * (count * 0.09) ** 0.5  # binomial, five deviations
    assert manifest["shared_ids"] == {"documents": 0, "example": ""}


def test_a_few_shared_ids_are_told(tmp_path, made, capsys):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts())]
    rows += [{"id": 7, "text": "another one"}, {"id": 9, "text": "and another"}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    command = ["data", "build", path, "--tokenizer", made / "t", "--context", 32, "--out"]
    command += [tmp_path / "d", "--validation-fraction", 0.1]
    assert run(list(map(str, command))) == 0
    said = capsys.readouterr().err
    assert "note: 2 documents have the id of another one, such as '" in said
    assert artifacts.read_manifest(tmp_path / "d")["shared_ids"]["example"] in ("7", "9")


def test_copies_are_no_shared_ids(tmp_path, made):
    """The same text under the same id, however often, tells nothing apart and harms nothing."""
    rows = [{"id": i, "text": text} for i, text in enumerate(texts())]
    path = write_rows(tmp_path / "x.jsonl", rows * 3)
    plain = tmp_path / "x.txt"
    plain.write_text("\n\n".join(texts() * 2))
    build_shards([path, plain], made / "t", tmp_path / "d", BuildOptions(32, 0.1))
    manifest = artifacts.read_manifest(tmp_path / "d")
    assert manifest["shared_ids"] == {"documents": 0, "example": ""}
    assert manifest["reading"]["documents"] == 1000


def test_ids_that_two_files_share(tmp_path, made):
    """Rows numbered from 0 in each file; the chunks are different parts."""
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for seed, path in enumerate(files):
        write_rows(path, [{"id": i, "text": text} for i, text in enumerate(texts(50, seed))])
    with pytest.raises(DataError, match=r"at least .* of 100 documents have the id of another one"):
        build_shards(files, made / "t", tmp_path / "d", BuildOptions(32, 0.1))


@pytest.mark.parametrize("window", [4, 1 << 23])
def test_shared_keys_in_parts(tmp_path, monkeypatch, window):
    """Against a plain count: documents whose key an earlier one with other tokens has."""
    import numpy as np

    monkeypatch.setattr("data_prep.parts.KEYS_AT_ONCE", window)
    rng = random.Random(3)
    paths, seen, expected = [], {}, 0
    for part in range(3):
        splits = []
        for split in range(2):
            documents = sorted((rng.randrange(8) << 60 | split, rng.randrange(2)) for _ in range(6))
            for key, text in documents:
                expected += seen.setdefault(key, text) != text
            keys = np.array([key for key, _ in documents], np.uint64)
            tokens = np.array([text for _, text in documents], np.uint16)
            splits.append(Documents(keys, np.ones(6, np.int64), tokens))
        paths.append(tmp_path / f"part-{part}")
        write_part(paths[-1], splits, {}, "tmp")
    found = find_shared(paths, 1000)
    assert (found.count, found.part is not None) == (expected, True)
    assert find_shared(paths, 2).count == 3
    assert find_shared(paths[:0], 2).count == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_shared_ids_against_a_plain_count(monkeypatch, seed, block):
    monkeypatch.setattr("data_prep.ids.SHARED_BLOCK", block)
    rng, first, expected, shared = random.Random(seed), {}, [], SharedIds()
    assert shared.found == (0, "")
    for _ in range(200):
        name, text = f"d{rng.randrange(60)}", f"text {rng.randrange(2)}"
        shared.add(name, text)
        if first.setdefault(name, text) != text:
            expected.append(name)
        if rng.random() < 0.1:
            assert shared.found == (len(expected), expected[0] if expected else "")
    assert shared.documents == 200 and shared.found[0] > 20


def test_shared_ids_count_documents_not_texts(tmp_path, made):
    """200 documents under one id have two texts: 100 of them are another document."""
    words = texts(2)
    rows = [{"id": i, "text": text} for i, text in enumerate(texts())]
    rows += [{"id": "x", "text": words[i % 2]} for i in range(200)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    message = "at least (11|100) of 400 documents have the id of another one, such as 'x'"
    with pytest.raises(DataError, match=message):
        list(split_ids([path], "train", 0.1, ReadOptions()))
    with pytest.raises(DataError, match=message):
        build_shards([path], made / "t", tmp_path / "d", BuildOptions(32, 0.1))


def test_shared_ids_outside_the_sample_are_refused(tmp_path, made):
    """The one id hashes high, so that no document that has it is sampled."""
    name = max((f"id{i}" for i in range(1000)), key=lambda each: id_hash(each, "sample"))
    rows = [{"id": i, "text": text} for i, text in enumerate(texts())]
    rows += [{"id": name, "text": text} for text in texts(200, 1)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    message = f"at least 199 of 400 documents have the id of another one, such as '{name}'"
    with pytest.raises(DataError, match=message):
        train_tokenizer([path], tmp_path / "t", 270, 4000)
    with pytest.raises(DataError, match=message):
        statistics_of(made / "t", [path], 4000)
    with pytest.raises(DataError, match=message):
        sweep([path], [270], "bpe", "bpe", 4000)
    assert not (tmp_path / "t").exists()


def test_a_part_is_opened_once_however_many_copies_it_holds(tmp_path, monkeypatch):
    import numpy as np

    from data_prep import parts

    count = 2000
    keys = np.repeat(np.arange(count // 4, dtype=np.uint64), 4)
    one = Documents(keys, np.full(count, 2), np.tile(np.array([5, 6], np.uint16), count))
    none = Documents(keys[:0], np.empty(0, np.int64), one.tokens_N[:0])
    write_part(tmp_path / "part", [one, none], {}, "tmp")
    opened, original = [], parts._columns
    monkeypatch.setattr(parts, "_columns", lambda *a: opened.append(a) or original(*a))
    assert find_shared([tmp_path / "part"], 10).count == 0
    assert len(opened) < 10


LEFT_OUT = "note: 1 bad records left out (x.jsonl line 201); 1 empty documents left out"


@pytest.mark.parametrize(
    "command",
    [
        ["tokenizer", "stats", "{t}", "{x}"],
        ["tokenizer", "sweep", "{x}", "--sizes", "270"],
        ["data", "ids", "{x}", "--split", "train"],
    ],
)
def test_commands_without_a_manifest_say_what_was_left_out(tmp_path, made, capsys, command):
    path = write_rows(tmp_path / "x.jsonl", [{"id": i, "text": t} for i, t in enumerate(texts())])
    path.write_text(path.read_text() + '{"id": 1}\n{"text": ""}\n')
    assert run([part.format(t=made / "t", x=path) for part in [*command, "--skip-bad"]]) == 0
    assert LEFT_OUT in capsys.readouterr().err


def test_how_many_are_a_few():
    require_few_shared(FEW_SHARED, "x", 20)
    require_few_shared(60, "x", 60_000)
    for shared, documents in ((FEW_SHARED + 1, 20), (61, 60_000)):
        with pytest.raises(DataError, match=f"at least {shared} of {documents:,} documents"):
            require_few_shared(shared, "x", documents)


def test_ids_are_printed_by_the_named_fields(tmp_path, capsys):
    path = write_rows(tmp_path / "x.jsonl", [{"key": f"k{i}", "code": "x"} for i in range(20)])
    listed = []
    for split in ("train", "validation"):
        command = ["data", "ids", str(path), "--split", split, "--validation-fraction", "0.5"]
        assert run([*command, "--field", "code", "--id-field", "key"]) == 0
        listed.append(capsys.readouterr().out.split())
    assert sorted(listed[0] + listed[1]) == sorted(f"k{i}" for i in range(20))
    assert all(id_hash(each, "split") < 2**63 for each in listed[1])


REQUESTS = {
    "field": ReadOptions(field="code"),
    "strict": ReadOptions(strict=True),
    "id_field": ReadOptions(id_field="key"),
    "skip_bad": ReadOptions(skip_bad=True),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_read_option_belongs_to_the_request(tmp_path, made, name, turned):
    rows = [{"text": t, "code": t[::-1], "key": f"k{i}"} for i, t in enumerate(texts())]
    path = write_rows(tmp_path / "x.jsonl", rows)
    first, second = (ReadOptions(), REQUESTS[name])[:: -1 if turned else 1]
    makers = [
        lambda read: train_tokenizer([path], tmp_path / "t", 270, read=read),
        lambda read: build_shards(
            [path], made / "t", tmp_path / "d", BuildOptions(32, 0.1, read=read)
        ),
    ]
    for make in makers:
        assert make(first) is True
        assert make(first) is False
        with pytest.raises(ArtifactError, match=rf"was made with another {name} \("):
            make(second)


def test_an_altered_tokenizer_is_not_called_complete(tmp_path, made):
    path = write_rows(tmp_path / "x.jsonl", [{"text": text} for text in texts()])
    train_tokenizer([path], tmp_path / "t", 270)
    content = bytearray((tmp_path / "t" / "tokenizer.json").read_bytes())
    content[-5] ^= 1
    (tmp_path / "t" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="was altered"):
        train_tokenizer([path], tmp_path / "t", 270)


def test_a_release_that_is_checked_later_is_no_other_request(tmp_path, made):
    path = write_rows(tmp_path / "x.jsonl", [{"text": text} for text in texts()])
    build_shards([path], made / "t", tmp_path / "d", BuildOptions(32, 0.1))
    record = {"version": "2026_03", "files": {"x.jsonl": {"sha256": artifacts.sha256_file(path)}}}
    artifacts.write_json(tmp_path / "release.json", record)
    assert build_shards([path], made / "t", tmp_path / "d", BuildOptions(32, 0.1)) is False
