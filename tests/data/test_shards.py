"""Shards read back through memory maps, against lists cut in plain Python."""

import itertools
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import load_dataset

from s2t2_dist import artifacts
from s2t2_dist.data.shards import (
    ROWS_PER_BATCH,
    ROWS_PER_SHARD,
    ShardReader,
    require_tokenizer,
    tokenizer_sha256,
)
from s2t2_dist.errors import ArtifactError, DataError
from tests.data.make_shards import PAD, make_data


def expected_rows(documents, context):
    """The oracle: concatenate and cut, in plain Python."""
    flat = list(itertools.chain.from_iterable(documents))
    starts = [0, *itertools.accumulate(map(len, documents))][:-1]
    rows = [flat[i : i + context] for i in range(0, len(flat), context)]
    row_starts = [[s % context for s in starts if s // context == i] for i in range(len(rows))]
    return rows, row_starts


@pytest.mark.parametrize("context", [2, 5, 64])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_the_documents_end_to_end(tmp_path, context, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(2, 300, rng.integers(1, 40)).tolist() for _ in range(150)]
    reader = ShardReader(make_data(tmp_path / "d", documents, context), "train")
    rows, starts = expected_rows(documents, context)
    assert len(reader) == len(rows)
    for i, row in enumerate(rows):
        assert reader[i].tolist() == row + [PAD] * (context - len(row))
        assert reader.length(i) == len(row)
        assert reader.document_starts(i).tolist() == starts[i]


def test_rows_across_batches_and_shards(tmp_path):
    # One token per document tells every row apart; the last shard and batch are partial.
    rows = ROWS_PER_SHARD + ROWS_PER_BATCH + 3
    vocab = 2 * rows
    documents = [np.arange(2 * rows - 1)]
    reader = ShardReader(make_data(tmp_path / "d", documents, 2, vocab), "train")
    shards = reader.metadata["splits"]["train"]["shards"]
    assert [shard["rows"] for shard in shards] == [ROWS_PER_SHARD, ROWS_PER_BATCH + 3]
    edges = [0, ROWS_PER_BATCH - 1, ROWS_PER_BATCH, ROWS_PER_SHARD - 1, ROWS_PER_SHARD, rows - 2]
    for i in edges:
        assert reader[i].tolist() == [2 * i, 2 * i + 1]
    assert reader[rows - 1].tolist() == [2 * rows - 2, PAD]
    assert reader.length(rows - 1) == 1


@pytest.mark.parametrize(("vocab", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_dtype_holds_the_largest_token_id(tmp_path, vocab, dtype):
    reader = ShardReader(make_data(tmp_path / "d", [[vocab - 1, 0]], 2, vocab), "train")
    assert reader[0].dtype == dtype
    assert reader[0].tolist() == [vocab - 1, 0]


def test_reading_allocates_nothing_and_is_read_only(tmp_path):
    reader = ShardReader(make_data(tmp_path / "d", [list(range(200))] * 500, 8), "train")
    before = pa.total_allocated_bytes()
    rows = [reader[i] for i in range(len(reader))]
    assert pa.total_allocated_bytes() == before
    assert not any(row.flags.owndata or row.flags.writeable for row in rows)


def test_index_out_of_range_and_iteration(tmp_path):
    reader = ShardReader(make_data(tmp_path / "d", [[5, 6, 7]], 2), "train")
    assert [row.tolist() for row in reader] == [[5, 6], [7, PAD]]
    for i in (-3, 2):
        with pytest.raises(IndexError):
            reader[i]


@pytest.mark.parametrize("number", [int, np.int64, np.uint16])
def test_numbers_and_slices_are_those_of_a_list(tmp_path, number):
    reader = ShardReader(make_data(tmp_path / "d", [list(range(2, 40)), [50] * 7], 4), "train")
    rows = [row.tolist() for row in reader]
    for i in range(-len(rows), len(rows)):
        if i < 0 and number is np.uint16:
            continue
        assert reader[number(i)].tolist() == rows[i]
        assert reader.length(number(i)) == reader.length(i % len(rows))
        starts = reader.document_starts(i % len(rows))
        assert np.array_equal(reader.document_starts(number(i)), starts)
    for part in (slice(2), slice(-3, None), slice(None, None, -2), slice(5, 2), slice(0, 99, 3)):
        assert [row.tolist() for row in reader[part]] == rows[part]
    for wrong in (-len(rows) - 1, len(rows), 10**30):
        with pytest.raises(IndexError):
            reader[wrong]
    for wrong in (1.5, "1", None):
        with pytest.raises(TypeError):
            reader[wrong]


def test_a_reader_pickles_for_spawned_workers(tmp_path, monkeypatch):
    make_data(tmp_path / "d", [list(range(2, 40))], 4)
    monkeypatch.chdir(tmp_path)
    reader = ShardReader("d", "validation")
    assert reader[1].tolist() == [6, 7, 8, 9]  # opened
    content = pickle.dumps(reader)
    monkeypatch.chdir("/")
    copy = pickle.loads(content)
    assert [row.tolist() for row in copy] == [row.tolist() for row in reader]
    assert (copy.split, copy.metadata) == (reader.split, reader.metadata)


@pytest.mark.slow
def test_spawned_workers_of_torch_read_rows(tmp_path):
    from torch.utils.data import DataLoader

    reader = ShardReader(make_data(tmp_path / "d", [list(range(2, 40))], 4), "train")
    loader = DataLoader(
        reader, 2, num_workers=2, multiprocessing_context="spawn", collate_fn=np.stack
    )
    rows = np.concatenate(list(loader))
    assert rows.tolist() == [row.tolist() for row in reader]


def test_wrong_directories_are_refused(tmp_path):
    data = make_data(tmp_path / "d", [[5, 6, 7]], 2)
    with pytest.raises(DataError, match="no split 'test'"):
        ShardReader(data, "test")
    with pytest.raises(ArtifactError, match="is missing"):
        ShardReader(tmp_path / "absent", "train")
    with artifacts.sealed_directory(tmp_path / "other", {"kind": "translation"}):
        pass
    with pytest.raises(DataError, match="holds 'translation', not data"):
        ShardReader(tmp_path / "other", "train")
    (data / "COMPLETE").unlink()
    with pytest.raises(ArtifactError, match="was not finished"):
        ShardReader(data, "train")


def test_altered_shards_are_found(tmp_path):
    data = make_data(tmp_path / "d", [list(range(2, 200))], 8)
    shard = data / "train" / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert len(ShardReader(data, "train")) == 25  # the size is right, and that is all it looks at
    altered = r"train/shard-00000\.arrow was altered.*\(train rows 0 to 24\)"
    for split in ("train", "validation"):
        with pytest.raises(ArtifactError, match=altered):
            ShardReader(data, split, verify="full")
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"bytes, the manifest says .*\(train rows 0 to 24\)"):
        ShardReader(data, "train")
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow is missing.*\(train rows 0 to 24"):
        ShardReader(data, "validation")


def test_every_flipped_byte_is_found(tmp_path):
    data = make_data(tmp_path / "d", [list(range(2, 200))], 8)
    for path in data.rglob("*"):
        if not path.is_file():
            continue
        original = path.read_bytes()
        for place in np.linspace(0, len(original) - 1, 9, dtype=int):
            content = bytearray(original)
            content[place] ^= 0x10
            path.write_bytes(content)
            named = "manifest" if path.name == "COMPLETE" else path.name
            with pytest.raises(ArtifactError, match=named):
                ShardReader(data, "train", verify="full")
        path.write_bytes(original)
    assert len(ShardReader(data, "train", verify="full")) == 25


def test_datasets_loads_the_same_files(tmp_path):
    documents = [list(range(2, 200)), list(range(7, 50))]
    data = make_data(tmp_path / "d", documents, 8)
    files = str(data / "train" / "*.arrow")
    loaded = load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "c"))
    reader = ShardReader(data, "train")
    assert len(loaded) == len(reader)
    for i, row in enumerate(loaded):
        assert row["tokens"] == reader[i].tolist()
        assert row["length"] == reader.length(i)
        assert row["document_starts"] == reader.document_starts(i).tolist()


def test_require_tokenizer_names_both_hashes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": name}))
    one, two = tokenizer_sha256(tmp_path / "one"), tokenizer_sha256(tmp_path / "two")
    assert require_tokenizer({"tokenizer_sha256": one}, tmp_path / "one") is None
    with pytest.raises(DataError, match=f"{one}.*{two}"):
        require_tokenizer({"tokenizer_sha256": one}, tmp_path / "two")
    with pytest.raises(DataError, match="does not exist"):
        require_tokenizer({"tokenizer_sha256": one}, tmp_path / "three")
