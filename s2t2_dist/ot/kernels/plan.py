"""The kernels of `sums`: what a plan's entries add up to."""

import triton
import triton.language as tl

from s2t2_dist.ot.kernels.common import load_tile


@triton.jit
def plan_sums(
    plan, row_partial, col_partial, support, h, U, PART: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of PART rows and a block of columns of a plan (h, U).

    row_partial (blocks, h): sums of each row; col_partial (parts, U): of each column; support
    (parts, blocks): the number of entries that are not 0.
    """
    part, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((R, BLOCK), tl.float32)
    count = tl.zeros((R, BLOCK), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        p, _ = load_tile(plan, rows, columns, h, U)
        tl.store(row_partial + block * h + rows, tl.sum(p, 1), mask=rows < h)
        sums += p
        count += (p != 0).to(tl.float32)
    tl.store(col_partial + part * U + columns, tl.sum(sums, 0), mask=columns < U)
    tl.store(support + part * tl.num_programs(1) + block, tl.sum(tl.sum(count, 1), 0))


@triton.jit
def plan_logs(plan, logs, mass, h, U, PART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """logs (parts, blocks): the sums of p log p, p = P / mass; entries that are not positive: 0."""
    part, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((R, BLOCK), tl.float32)
    for start in range(0, PART, R):
        rows = part.to(tl.int64) * PART + start + tl.arange(0, R)
        p, _ = load_tile(plan, rows, columns, h, U)
        p = p / mass
        sums += tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
    tl.store(logs + part * tl.num_programs(1) + block, tl.sum(tl.sum(sums, 1), 0))
