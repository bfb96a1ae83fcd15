"""What a translate step needs on each of W ranks: bytes held and bytes sent, by arithmetic.

V source rows in all, U target tokens, D model width. `tests.bench.scaling` measures a slice against
these formulas. They hold the translator and its optimizer; the language model comes on top.
"""

from math import ceil

SINGLE, DOUBLE = 4, 8  # bytes of a float32 and a float64
TILE = 1 << 20  # bytes of a tile of C on a CPU
TILES = 16  # that a pass holds at most: 2n + 1 iterates, the gradient's, sums
PRODUCT_ROWS = 256  # of a tile of P in a product, and of dloss/dP


def cost_states(V: int, U: int, ranks: int) -> dict[str, int]:
    """Bytes of C and what AdamW keeps of it, on the rank with the most rows, at all times."""
    entries = ceil(V / ranks) * U
    return {
        "C": SINGLE * entries,
        "gradient of C": SINGLE * entries,
        "AdamW moments": 2 * SINGLE * entries,
    }


def rank_memory(
    V: int, U: int, D: int, ranks: int, iterations: int = 3, tied: bool = False
) -> dict[str, int]:
    """Bytes on the rank with the most rows, at the peak of a step.

    C, its gradient and AdamW's two moments are cut by rows; so are E and L in float32 (one matrix
    where tied). E', L' and their gradients are whole on every rank, and so is the one matrix that
    the gradients are summed in: these bound what more ranks save. Of the solver remain, per
    iteration, a threshold now and of the last step, a count (float64) and a backward mean for each
    row and column, and the tiles in work.
    """
    rows = ceil(V / ranks)
    per_lane = iterations * (3 * SINGLE + DOUBLE) + SINGLE + DOUBLE
    return {
        **cost_states(V, U, ranks),
        "rows of E and L": (1 if tied else 2) * SINGLE * rows * D,
        "E', L'": 2 * SINGLE * U * D,
        "gradients of E', L'": 2 * SINGLE * U * D,
        "those side by side": 2 * SINGLE * U * D,
        "thresholds, counts, means": per_lane * (rows + U),
        "tiles": TILES * TILE + 2 * SINGLE * min(rows, PRODUCT_ROWS) * U,
    }


def rank_traffic(
    U: int, D: int, iterations: int = 3, column_evaluations: int = 12
) -> dict[str, int]:
    """Bytes that a rank hands to all-reduces in a step, whatever their number (`sent` for those).

    A column search sends each column's total once, and a count and an excess per Newton evaluation,
    in float64: `column_evaluations` counts those of all iterations, each at its most, because
    columns that have converged send nothing. A backward iteration sums one U-vector, the
    statistics another. Scalars are left out.
    """
    return {
        "E', L'": 2 * SINGLE * U * D,
        "gradients of E', L'": 2 * SINGLE * U * D,
        "column totals": iterations * DOUBLE * U,
        "column searches": column_evaluations * 2 * DOUBLE * U,
        "backward and statistics": (iterations + 1) * DOUBLE * U,
    }


def sent(payload: int, ranks: int) -> int:
    """Bytes that leave a rank when a ring all-reduces `payload` bytes: 2 (W - 1) / W of them.

    The kernel's loopback counter agreed within 1% for gloo on 2 and 4 ranks from 400 kB on; below
    that, packet headers add up.
    """
    return 2 * payload * (ranks - 1) // ranks
