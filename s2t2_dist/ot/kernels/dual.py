"""The kernels of the dual method: the two searches of `dual_passes`.

top (V,) is each row's largest entry of C, row (V,) and col (U,) the potentials; tiles and chunks
are those of `dykstra`.
"""

import triton
import triton.language as tl

from s2t2_dist.ot.kernels.common import above, below, load_tile, stepped


@triton.jit
def row_chunk(cost, top, col, rows, columns, V, U):
    """Entries less their row's largest; and less their column's potential, -inf beside columns."""
    c, _ = load_tile(cost, rows, columns, V, U)
    x = c - top[:, None]
    potential = tl.load(col + columns, mask=columns < U, other=0.0)[None, :]
    return x, tl.where((columns < U)[None, :], x - potential, float("-inf"))


@triton.jit
def search_rows(
    cost, top, row, col, mu, errors, tops, partial, V, U, PART: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Potentials of PART rows, from the guesses that row holds.

    errors (parts,): the largest relative error of a row sum under the guesses. Where a row is one
    chunk, also of the columns under the new potentials: tops (parts, U), the largest entry, and
    partial (parts, 2, U), counts and excesses above col.
    """
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    at = tl.load(col + columns, mask=columns < U, other=0.0)[None, :]
    worst = tl.zeros((R,), tl.float32)
    top_sum = tl.full((BLOCK,), float("-inf"), tl.float32)
    count_sum = tl.zeros((BLOCK,), tl.float32)
    excess_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        here = rows < V
        top_c = tl.load(top + rows, mask=here, other=0.0)
        x, z = row_chunk(cost, top_c, col, rows, columns, V, U)
        largest = tl.max(z, 1)
        for chunk in range(1, CHUNKS):
            _, more = row_chunk(cost, top_c, col, rows, chunk * BLOCK + columns, V, U)
            largest = tl.maximum(largest, tl.max(more, 1))
        scale = tl.load(mu + rows, mask=here, other=1.0)
        ceiling = below(largest)
        floor = tl.minimum((largest.to(tl.float64) - scale).to(tl.float32), ceiling)
        threshold = tl.load(row + rows, mask=here, other=0.0)
        count = tl.full((R,), -1.0, tl.float32)
        moving = here
        first = here
        while tl.max(moving.to(tl.int32), 0) > 0:
            before = count
            count, excess = above(z, threshold)
            for chunk in range(1, CHUNKS):
                _, more = row_chunk(cost, top_c, col, rows, chunk * BLOCK + columns, V, U)
                more_count, more_excess = above(more, threshold)
                count += more_count
                excess += more_excess
            off = (tl.abs(excess.to(tl.float64) - scale) / scale).to(tl.float32)
            worst = tl.maximum(worst, tl.where(first, off, 0.0))
            first = first & (rows < 0)  # none any more
            threshold, moves = stepped(threshold, floor, ceiling, before, count, excess, scale)
            floor = threshold
            moving = moving & moves
        tl.store(row + rows, threshold, mask=here)
        if CHUNKS == 1:
            entry = tl.where(here[:, None], x - threshold[:, None], float("-inf"))
            top_sum = tl.maximum(top_sum, tl.max(entry, 0))
            on = entry > at
            count_sum += tl.sum(on.to(tl.float32), 0)
            excess_sum += tl.sum(tl.where(on, entry - at, 0.0), 0)
    tl.store(errors + part, tl.max(worst, 0))
    if CHUNKS == 1:
        tl.store(tops + part * U + columns, top_sum, mask=columns < U)
        where = partial + part * 2 * U + columns
        tl.store(where, count_sum, mask=columns < U)
        tl.store(where + U, excess_sum, mask=columns < U)


@triton.jit
def column_sums(
    cost, top, row, threshold, moving, tops, partial, V, U, TOP: tl.constexpr,
    PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of PART rows and a block of columns, unless none of them moves: partial (parts, 2, U).

    Where TOP, also tops (parts, U).
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(moving + columns, mask=columns < U, other=0)
    if tl.max(active, 0) > 0:
        at = tl.load(threshold + columns, mask=columns < U, other=0.0)[None, :]
        largest = tl.full((R, BLOCK), float("-inf"), tl.float32)
        count = tl.zeros((R, BLOCK), tl.float32)
        excess = tl.zeros((R, BLOCK), tl.float32)
        for start in range(0, PART, R):
            rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
            here = rows < V
            c, _ = load_tile(cost, rows, columns, V, U)
            top_c = tl.load(top + rows, mask=here, other=0.0)[:, None]
            entry = (c - top_c) - tl.load(row + rows, mask=here, other=0.0)[:, None]
            entry = tl.where(here[:, None], entry, float("-inf"))
            on = entry > at
            count += on.to(tl.float32)
            excess += tl.where(on, entry - at, 0.0)
            largest = tl.maximum(largest, entry)
        where = partial + part * 2 * U + columns
        tl.store(where, tl.sum(count, 0), mask=columns < U)
        tl.store(where + U, tl.sum(excess, 0), mask=columns < U)
        if TOP:
            tl.store(tops + part * U + columns, tl.max(largest, 0), mask=columns < U)
