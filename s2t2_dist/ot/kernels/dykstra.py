"""The kernels of Dykstra's method: those of `dykstra_passes`, an entry's iterates in registers.

tau (n, V) and sigma (n, U) are the thresholds of rows and columns, shift (V,) each row's largest
entry. R rows and BLOCK columns are a tile; a row of more than BLOCK columns is cut into CHUNKS, of
which the first stays in registers while the others are read again, from the L2 cache.
"""

import triton
import triton.language as tl

from s2t2_dist.ot.kernels.common import above, below, load_tile, stepped


@triton.jit
def iterates(z, tau, sigma, rows, columns, V, U, K: tl.constexpr):
    """Z_K and the columns' correction min(W_{K-1}, sigma_{K-1}), from z = Z_0."""
    q = tl.zeros_like(z)
    for k in tl.static_range(K):
        t = tl.load(tau + k * V + rows, mask=rows < V, other=0.0)[:, None]
        s = tl.load(sigma + k * U + columns, mask=columns < U, other=0.0)[None, :]
        p = tl.minimum(z, t)
        w = (z - p) + q
        q = tl.minimum(w, s)
        z = (w - q) + p
    return z, q


@triton.jit
def row_chunk(cost, shift, tau, sigma, rows, columns, V, U, K: tl.constexpr):
    """Z_K, -inf where there is no column, and the correction."""
    c, _ = load_tile(cost, rows, columns, V, U)
    z, q = iterates(c - shift[:, None], tau, sigma, rows, columns, V, U, K)
    return tl.where((columns < U)[None, :], z, float("-inf")), q


@triton.jit
def row_top(cost, rows, V, U, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """Each row's largest entry; 0 where there is no row."""
    top = tl.full(rows.shape, float("-inf"), tl.float32)
    for chunk in range(CHUNKS):
        columns = chunk * BLOCK + tl.arange(0, BLOCK)
        c, _ = load_tile(cost, rows, columns, V, U)
        top = tl.maximum(top, tl.max(tl.where((columns < U)[None, :], c, float("-inf")), 1))
    return top


@triton.jit
def search(
    cost, shift, tau, sigma, mu, row_count, col_guess, partial, V, U, K: tl.constexpr,
    PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """tau_K of PART rows, from the guesses it holds; shift where K is 0; row_count (V,).

    Where a row is one chunk, also partial (parts, 3, U): count and excess above col_guess, and sum,
    of W_K's columns.
    """
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    guess = tl.load(col_guess + columns, mask=columns < U, other=0.0)[None, :]
    count_sum = tl.zeros((BLOCK,), tl.float32)
    excess_sum = tl.zeros((BLOCK,), tl.float32)
    total_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        here = rows < V
        if K == 0:
            top_c = row_top(cost, rows, V, U, BLOCK, CHUNKS)
            tl.store(shift + rows, top_c, mask=here)
        else:
            top_c = tl.load(shift + rows, mask=here, other=0.0)
        z, q = row_chunk(cost, top_c, tau, sigma, rows, columns, V, U, K)
        top = tl.max(z, 1)
        for chunk in range(1, CHUNKS):
            more, _ = row_chunk(cost, top_c, tau, sigma, rows, chunk * BLOCK + columns, V, U, K)
            top = tl.maximum(top, tl.max(more, 1))
        scale = tl.load(mu + rows, mask=here, other=1.0)
        ceiling = below(top)
        floor = tl.minimum((top.to(tl.float64) - scale).to(tl.float32), ceiling)
        first = tl.load(tau + K * V + rows, mask=here, other=0.0)
        threshold = tl.minimum(tl.maximum(first, floor), ceiling)
        count = tl.full((R,), -1.0, tl.float32)
        moving = here
        while tl.max(moving.to(tl.int32), 0) > 0:
            before = count
            count, excess = above(z, threshold)
            for chunk in range(1, CHUNKS):
                more, _ = row_chunk(cost, top_c, tau, sigma, rows, chunk * BLOCK + columns, V, U, K)
                more_count, more_excess = above(more, threshold)
                count += more_count
                excess += more_excess
            threshold, moves = stepped(threshold, floor, ceiling, before, count, excess, scale)
            floor = threshold
            moving = moving & moves
        tl.store(tau + K * V + rows, threshold, mask=here)
        tl.store(row_count + rows, count.to(tl.float64), mask=here)
        if CHUNKS == 1:
            w = tl.where(here[:, None], tl.maximum(z - threshold[:, None], 0.0) + q, 0.0)
            on = (w > guess) & here[:, None]
            count_sum += tl.sum(on.to(tl.float32), 0)
            excess_sum += tl.sum(tl.where(on, w - guess, 0.0), 0)
            total_sum += tl.sum(w, 0)
    if CHUNKS == 1:
        where = partial + part * 3 * U + columns
        tl.store(where, count_sum, mask=columns < U)
        tl.store(where + U, excess_sum, mask=columns < U)
        tl.store(where + 2 * U, total_sum, mask=columns < U)


@triton.jit
def column_sums(
    cost, shift, tau, sigma, threshold, moving, partial, V, U, K: tl.constexpr,
    TOTAL: tl.constexpr, PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of PART rows and a block of W_K's columns, unless none of them moves: partial sums.

    partial (parts, 2, U): counts and excesses above the thresholds; (parts, 3, U) with the sums of
    all entries where TOTAL.
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    active = tl.load(moving + columns, mask=columns < U, other=0)
    if tl.max(active, 0) > 0:
        at = tl.load(threshold + columns, mask=columns < U, other=0.0)[None, :]
        count = tl.zeros((R, BLOCK), tl.float32)
        excess = tl.zeros((R, BLOCK), tl.float32)
        total = tl.zeros((R, BLOCK), tl.float32)
        for start in range(0, PART, R):
            rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
            here = (rows < V)[:, None]
            top = tl.load(shift + rows, mask=rows < V, other=0.0)
            c, _ = load_tile(cost, rows, columns, V, U)
            z, q = iterates(c - top[:, None], tau, sigma, rows, columns, V, U, K)
            t = tl.load(tau + K * V + rows, mask=rows < V, other=0.0)[:, None]
            w = tl.maximum(z - t, 0.0) + q
            on = (w > at) & here
            count += on.to(tl.float32)
            excess += tl.where(on, w - at, 0.0)
            if TOTAL:
                total += tl.where(here, w, 0.0)
        where = partial + part * (3 if TOTAL else 2) * U + columns
        tl.store(where, tl.sum(count, 0), mask=columns < U)
        tl.store(where + U, tl.sum(excess, 0), mask=columns < U)
        if TOTAL:
            tl.store(where + 2 * U, tl.sum(total, 0), mask=columns < U)


@triton.jit
def plan(
    cost, shift, tau, sigma, out, first, h, V, U, N: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the (h, U) rows of the plan from `first` on."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (rows < h)[:, None] & (columns < U)[None, :]
    ahead = rows + first
    c, _ = load_tile(cost, ahead, columns, V, U)
    top = tl.load(shift + ahead, mask=ahead < V, other=0.0)
    z, q = iterates(c - top[:, None], tau, sigma, ahead, columns, V, U, N - 1)
    t = tl.load(tau + (N - 1) * V + ahead, mask=ahead < V, other=0.0)[:, None]
    s = tl.load(sigma + (N - 1) * U + columns, mask=columns < U, other=0.0)[None, :]
    w = tl.maximum(z - t, 0.0) + q
    tl.store(out + rows[:, None] * U + columns[None, :], tl.maximum(w - s, 0.0), mask=real)


@triton.jit
def supports(cost, shift, tau, sigma, rows, columns, V, U, N: tl.constexpr):
    """Bit 2k: Z_k is above tau_k; bit 2k + 1: W_k is above sigma_k. 0 where no entry is."""
    c, real = load_tile(cost, rows, columns, V, U)
    z = c - tl.load(shift + rows, mask=rows < V, other=0.0)[:, None]
    q = tl.zeros_like(z)
    on = tl.zeros(z.shape, tl.int32)
    for k in tl.static_range(N):
        t = tl.load(tau + k * V + rows, mask=rows < V, other=0.0)[:, None]
        s = tl.load(sigma + k * U + columns, mask=columns < U, other=0.0)[None, :]
        p = tl.minimum(z, t)
        w = (z - p) + q
        on |= tl.where(z > t, 1 << (2 * k), 0) | tl.where(w > s, 2 << (2 * k), 0)
        q = tl.minimum(w, s)
        z = (w - q) + p
    return tl.where(real, on, 0)


@triton.jit
def undo_column(on, gx, gq, col_mean, columns, U, N: tl.constexpr, D: tl.constexpr):
    """gw of the column step of iteration N - 1 - D, as `dykstra_passes._back_pass` calls it."""
    mean = tl.load(col_mean + D * U + columns, mask=columns < U, other=0.0)[None, :]
    return tl.where((on & (2 << (2 * (N - 1 - D)))) != 0, gx - gq - mean, 0.0) + gq


@triton.jit
def undone(on, gx, col_mean, row_mean, rows, columns, V, U, N: tl.constexpr, DONE: tl.constexpr):
    """gx and gq after DONE iterations are undone, whose means are known."""
    gq = tl.zeros_like(gx)
    for d in tl.static_range(DONE):
        gw = undo_column(on, gx, gq, col_mean, columns, U, N, d)
        gp = gx
        if d == 0:
            gp = tl.zeros_like(gx)
        mean = tl.load(row_mean + d * V + rows, mask=rows < V, other=0.0)[:, None]
        gx = tl.where((on & (1 << (2 * (N - 1 - d)))) != 0, gw - gp - mean, 0.0) + gp
        gq = gw
    return gx, gq


@triton.jit
def row_gradient(
    cost, shift, tau, sigma, grad, col_mean, row_mean, rows, columns, V, U, N: tl.constexpr,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """(gw, gp, gy, supports), of `dykstra_passes._back_pass` before its last row mean."""
    on = supports(cost, shift, tau, sigma, rows, columns, V, U, N)
    g, _ = load_tile(grad, rows, columns, V, U)
    gx, gq = undone(on, g, col_mean, row_mean, rows, columns, V, U, N, KNOWN - 1)
    gw = undo_column(on, gx, gq, col_mean, columns, U, N, KNOWN - 1)
    gp = gx
    if KNOWN == 1:
        gp = tl.zeros_like(gx)
    return gw, gp, tl.where((on & (1 << (2 * (N - KNOWN)))) != 0, gw - gp, 0.0), on


@triton.jit
def back_rows(
    cost, shift, tau, sigma, grad, out, col_mean, row_mean, row_count, partial, V, U,
    N: tl.constexpr, KNOWN: tl.constexpr, PART: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """row_mean[KNOWN - 1] of PART rows.

    Where a row is one chunk, also what `back_columns` makes of KNOWN.
    """
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        here = rows < V
        count = tl.load(row_count + rows, mask=here, other=1.0)
        gw, gp, gy, on = row_gradient(
            cost, shift, tau, sigma, grad, col_mean, row_mean, rows, columns, V, U, N, KNOWN
        )
        total = tl.sum(gy, 1)
        for chunk in range(1, CHUNKS):
            _, _, more, _ = row_gradient(
                cost, shift, tau, sigma, grad, col_mean, row_mean, rows,
                chunk * BLOCK + columns, V, U, N, KNOWN,
            )  # fmt: skip
            total += tl.sum(more, 1)
        mean = (total.to(tl.float64) / count).to(tl.float32)
        tl.store(row_mean + (KNOWN - 1) * V + rows, mean, mask=here)
        if CHUNKS == 1:
            on_row = (on & (1 << (2 * (N - KNOWN)))) != 0
            gx = tl.where(on_row, gy - mean[:, None], 0.0) + gp
            if KNOWN == N:
                real = here[:, None] & (columns < U)[None, :]
                tl.store(out + rows[:, None] * U + columns[None, :], gx, mask=real)
            else:
                on_column = (on & (2 << (2 * (N - 1 - KNOWN)))) != 0
                sums += tl.sum(tl.where(on_column, gx - gw, 0.0), 0)
    if CHUNKS == 1 and KNOWN < N:
        tl.store(partial + part * U + columns, sums, mask=columns < U)


@triton.jit
def back_columns(
    cost, shift, tau, sigma, grad, out, col_mean, row_mean, partial, V, U, N: tl.constexpr,
    KNOWN: tl.constexpr, PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PART rows and a block of columns: partial (parts, U), the sums whose means come next.

    Where all of N means are known, dloss/dC over out instead.
    """
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((R, BLOCK), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        on = supports(cost, shift, tau, sigma, rows, columns, V, U, N)
        g, real = load_tile(grad, rows, columns, V, U)
        gx, gq = undone(on, g, col_mean, row_mean, rows, columns, V, U, N, KNOWN)
        if KNOWN == N:
            tl.store(out + rows[:, None] * U + columns[None, :], gx, mask=real)
        else:
            sums += tl.where((on & (2 << (2 * (N - 1 - KNOWN)))) != 0, gx - gq, 0.0)
    if KNOWN < N:
        tl.store(partial + part * U + columns, tl.sum(sums, 0), mask=columns < U)
