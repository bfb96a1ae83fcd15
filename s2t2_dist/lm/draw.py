"""An unbiased choice of few weights among many."""

import numpy as np


def draw(
    log_weights: np.ndarray, count: int, draws: np.random.Generator
) -> list[tuple[int, float]]:
    """Draw at most so many of any number of weights, so that every expected weight is unchanged.

    Source: Fearnhead and Clifford 2003, On-line inference for hidden Markov models via particle
    filters, section 3: among all such draws, the least squared error of the weights.

    Returns:
        Indices and their new log weights.
    """
    if len(log_weights) <= count:
        return list(enumerate(log_weights.tolist()))
    if count == 0:
        return []
    order = np.argsort(-log_weights, kind="stable")
    top = log_weights[order[0]]
    weights = np.exp(log_weights[order] - top)
    tails = np.cumsum(weights[::-1])[::-1]
    sure = 0
    while sure < count and weights[sure] * (count - sure) >= tails[sure]:
        sure += 1
    found = [(int(i), float(log_weights[i])) for i in order[:sure]]
    if sure == count:  # what is left is 0 in floating point
        return found
    unit = tails[sure] / (count - sure)
    points = (draws.random() + np.arange(count - sure)) * unit
    chosen = np.searchsorted(np.cumsum(weights[sure:]), points, side="right") + sure
    chosen = np.minimum(chosen, len(order) - 1)
    return found + [(int(i), float(top + np.log(unit))) for i in order[chosen]]
