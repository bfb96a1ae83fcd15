"""What the kernels of both methods share: floats next to each other, a row's search, a column's.

A kernel's program owns a block of rows, or of rows and columns. Sums over rows are made in float32
over the rows of a program, and over programs by torch in float64, always in the same order: results
repeat bit for bit.

No kernel multiplies what decides a support: nothing can be contracted to a fused multiply-add, and
every kernel finds the same iterates of an entry.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(matrix, rows, columns, V, U):
    """A tile of a (V, U) matrix and where it is real; elsewhere it is 0."""
    real = (rows < V)[:, None] & (columns < U)[None, :]
    return tl.load(matrix + rows[:, None] * U + columns[None, :], mask=real, other=0.0), real


@triton.jit
def below(x):
    """The next float32 under x, as `simplex.below`."""
    bits = x.to(tl.int32, bitcast=True)
    down = tl.where(x < 0, bits + 1, tl.where(x > 0, bits - 1, -2147483647))
    return down.to(tl.float32, bitcast=True)


@triton.jit
def above(z, threshold):
    """Of each row's entries above its threshold: their number, and the sum of what is above."""
    over = z - threshold[:, None]
    on = over > 0
    return tl.sum(on.to(tl.float32), 1), tl.sum(tl.where(on, over, 0.0), 1)


@triton.jit
def stepped(threshold, floor, ceiling, before, count, excess, scale):
    """`simplex.newton_step`: thresholds, and which moved."""
    moves = count != before
    number = tl.maximum(count, 1.0).to(tl.float64)
    newton = threshold.to(tl.float64) + (excess.to(tl.float64) - scale) / number
    newton = tl.where(count > 0, newton.to(tl.float32), float("-inf"))  # to the floor
    newton = tl.minimum(tl.maximum(newton, floor), ceiling)
    return tl.where(moves, newton, threshold), moves


@triton.jit
def column_newton(
    sums, nu, ceiling, threshold, floor, good, count, moving, flags, U, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`simplex.NewtonSearch.update` of a block of columns; flags[block]: whether one moves.

    sums (2, U) float64: counts and excesses. ceiling is read where TOP.
    """
    block = tl.program_id(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    real = columns < U
    number = tl.load(sums + columns, mask=real, other=1.0)
    excess = tl.load(sums + U + columns, mask=real, other=0.0)
    scale = tl.load(nu + columns, mask=real, other=1.0)
    old = tl.load(threshold + columns, mask=real, other=0.0)
    low = tl.load(floor + columns, mask=real, other=0.0)
    kept = tl.load(good + columns, mask=real, other=0.0)
    before = tl.load(count + columns, mask=real, other=1.0)
    moved = tl.load(moving + columns, mask=real, other=0) != 0
    high = tl.full((BLOCK,), float("inf"), tl.float32)
    if TOP:
        high = tl.load(ceiling + columns, mask=real, other=0.0)
    new, moves = stepped(old, low, high, before, number, excess, scale)
    over = (number == 0) & (before < float("inf"))
    kept = tl.where(over, kept, tl.minimum(new, old))
    new = tl.where(over, kept, new)
    mask = real & moved
    tl.store(threshold + columns, new, mask=mask)
    tl.store(floor + columns, new, mask=mask)
    tl.store(good + columns, kept, mask=mask)
    tl.store(count + columns, tl.where(over, before, number), mask=mask)
    still = (moves & (over == 0) & moved).to(tl.int32)
    tl.store(moving + columns, still, mask=real)
    tl.store(flags + block, tl.max(still, 0))
