"""Batches, and the training order as a pure function of seed and position."""

import itertools
import threading
import time

import numpy as np
import pytest

from s2t2_dist.data.batches import count_predicted, load_batch, read_ahead
from s2t2_dist.data.order import row_at, rows_at
from s2t2_dist.data.shards import ShardReader
from tests.data.make_shards import PAD, make_data


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
    assert rows_at(np.arange(8), 1000, 0).tolist() == [787, 104, 791, 429, 349, 171, 176, 956]
    later = 3 * 18_600_000 + np.arange(4)
    assert rows_at(later, 18_600_000, 7).tolist() == [9252621, 15657171, 1960455, 6786713]


@pytest.mark.parametrize("rows", [3, 7, 20, 33])
def test_each_place_of_an_epoch_holds_every_row_equally_often(rows):
    epochs = np.arange(400_000)
    for place in (0, rows - 1):
        counts = np.bincount(rows_at(epochs * rows + place, rows, seed=0), minlength=rows)
        expected = len(epochs) / rows
        chi2 = ((counts - expected) ** 2).sum() / expected
        # Chi-square with rows - 1 degrees: mean rows - 1, variance twice that; six deviations.
        # Half as many Feistel rounds fail this at 7 rows with a chi-square of 250.
        assert chi2 < rows - 1 + 6 * np.sqrt(2 * (rows - 1))


def test_neighbouring_positions_are_uncorrelated():
    rows = 50_000
    order = rows_at(np.arange(rows), rows, 1).astype(float)
    for lag in (1, 2, 16, 256):
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        # The standard deviation is 1 / sqrt(rows) = 0.0045; five of them.
        assert abs(correlation) < 0.0224


def test_document_mask_restarts_positions_and_hides_first_tokens(tmp_path):
    documents = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14]]
    reader = ShardReader(make_data(tmp_path / "d", documents, 5), "train")
    batch = load_batch(reader, [0, 1], document_mask=True)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100], [10, 11, 12, 13, -100]]
    assert batch.predicted == count_predicted(reader, [0, 1], document_mask=True) == 2 + 3
    assert load_batch(reader, [0]).position_ids is None


def test_reading_ahead_gives_the_same_items_and_the_error_in_its_turn():
    assert list(read_ahead(lambda i: 2 * i, range(3, 1000))) == list(range(6, 2000, 2))
    assert list(read_ahead(lambda i: i, range(0))) == []
    assert list(read_ahead(lambda i: i, range(1))) == [0]

    def failing(i):
        if i == 3:
            raise ValueError("third")
        return i

    items = read_ahead(failing, range(1, 9))
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(items)


def test_reading_stays_ahead_and_ends_with_its_reader():
    made = []

    def threads():
        return [t for t in threading.enumerate() if t.name.startswith("read-ahead")]

    items = read_ahead(made.append, range(100), ahead=2)
    next(items)
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:  # one taken, two ahead
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == [0, 1, 2] and len(threads()) == 1
    items.close()
    assert not threads()
