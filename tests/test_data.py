"""Shards read back through memory maps, and the training order as a pure function."""

import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_prep.shards import RowWriter
from s2t2_dist import artifacts
from s2t2_dist.data import (
    ROWS_PER_BATCH,
    ROWS_PER_SHARD,
    TOKEN_BYTES,
    ShardReader,
    count_predicted,
    load_batch,
    require_tokenizer,
    row_at,
    rows_at,
    shard_schema,
    token_dtype,
    tokenizer_sha256,
)
from s2t2_dist.errors import ArtifactError, DataError

PAD = 1


def make_data(target, documents, context, vocab_size=300):
    """A sealed data directory with the same documents in both splits."""
    record = {"kind": "data", "context": context, "vocab_size": vocab_size, "splits": {}}
    with artifacts.sealed_directory(target, record) as directory:
        for split in ("train", "validation"):
            schema = shard_schema(context, vocab_size, {})
            with RowWriter(directory / split, schema, PAD) as writer:
                for document in documents:
                    writer.add(np.asarray(document, token_dtype(vocab_size)))
            rows = sum(shard["rows"] for shard in writer.shards)
            record["splits"][split] = {"rows": rows, "shards": writer.shards}
        np.save(directory / TOKEN_BYTES, np.arange(vocab_size))
    return target


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
    for i in (-1, 2):
        with pytest.raises(IndexError):
            reader[i]


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
    with pytest.raises(ArtifactError, match=r"shard-00000\.arrow was altered"):
        ShardReader(data, "train", verify="full")
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match="bytes, the manifest says"):
        ShardReader(data, "train")


def test_require_tokenizer_names_both_hashes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(name))
    one, two = tokenizer_sha256(tmp_path / "one"), tokenizer_sha256(tmp_path / "two")
    assert require_tokenizer({"tokenizer_sha256": one}, tmp_path / "one") is None
    with pytest.raises(DataError, match=f"{one}.*{two}"):
        require_tokenizer({"tokenizer_sha256": one}, tmp_path / "two")
    with pytest.raises(DataError, match="does not exist"):
        require_tokenizer({"tokenizer_sha256": one}, tmp_path / "three")


def test_batches_mask_padding_by_length(tmp_path):
    # The pad id also occurs as an ordinary token: only the length may decide.
    reader = ShardReader(make_data(tmp_path / "d", [[5, PAD, 7, PAD, 9, PAD]], 4), "train")
    batch = load_batch(reader, [1, 0])
    assert batch.input_ids.tolist() == [[9, PAD, PAD, PAD], [5, PAD, 7, PAD]]
    assert batch.labels.tolist() == [[9, PAD, -100, -100], [5, PAD, 7, PAD]]
    assert batch.predicted == count_predicted(reader, [1, 0]) == 1 + 3
    assert str(batch.input_ids.dtype) == str(batch.labels.dtype) == "torch.int64"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 70_001])
def test_every_epoch_visits_every_row_once(rows):
    for seed, epoch in itertools.product((0, 1, 2**40), (0, 1, 1000)):
        order = rows_at(np.arange(epoch * rows, (epoch + 1) * rows), rows, seed)
        assert np.array_equal(np.sort(order), np.arange(rows))


def test_order_is_a_pure_function_of_seed_and_position():
    positions = np.random.default_rng(0).integers(0, 5000, (7, 11))
    together = rows_at(positions, 1000, seed=3)
    assert together.shape == (7, 11)
    assert together.tolist() == [[row_at(p, 1000, 3) for p in line] for line in positions.tolist()]
    # Ranks that share the positions out read the same rows as one rank does.
    one = rows_at(np.arange(2400), 1000, 3)
    ranks = [rows_at(np.arange(rank, 2400, 3), 1000, 3) for rank in range(3)]
    assert np.array_equal(np.stack(ranks, axis=1).ravel(), one)


def test_order_differs_between_seeds_and_epochs():
    orders = [rows_at(np.arange(1000) + 1000 * e, 1000, s) for s in range(4) for e in range(4)]
    for a, b in itertools.combinations(orders, 2):
        # Independent permutations agree in 1 place on average (Poisson): 12 has chance 1e-9.
        assert np.count_nonzero(a == b) < 12


def test_order_never_changes_between_versions():
    # A resumed run depends on these numbers; they were made by the first version.
    assert rows_at(np.arange(8), 1000, 0).tolist() == [637, 180, 476, 160, 775, 298, 582, 669]
    later = 3 * 18_600_000 + np.arange(4)
    assert rows_at(later, 18_600_000, 7).tolist() == [3898235, 6114407, 891427, 1612718]


@pytest.mark.parametrize("rows", [3, 7, 20])
def test_first_rows_are_uniform_over_seeds(rows):
    seeds = 20_000
    for position in (0, rows - 1):
        counts = Counter(row_at(position, rows, seed) for seed in range(seeds))
        observed = np.array([counts[row] for row in range(rows)])
        chi2 = ((observed - seeds / rows) ** 2).sum() / (seeds / rows)
        # Chi-square with rows - 1 degrees: mean rows - 1, variance twice that; six deviations.
        assert chi2 < rows - 1 + 6 * np.sqrt(2 * (rows - 1))


def test_neighbouring_positions_are_uncorrelated():
    rows = 50_000
    order = rows_at(np.arange(rows), rows, 1).astype(float)
    for lag in (1, 2, 16, 256):
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        # The standard deviation is 1 / sqrt(rows) = 0.0045; five of them.
        assert abs(correlation) < 0.0224
