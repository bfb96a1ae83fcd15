"""The learning rate as a pure function of the step."""

import math


def learning_rate(
    step: int, max_steps: int, peak: float, warmup_ratio: float = 0.2, min_lr_ratio: float = 0.1
) -> float:
    """Linear warm-up, then a cosine from `peak` to `min_lr_ratio * peak` (paper, section 3).

    Args:
        step: the optimizer step about to be taken, from 0. The peak is first used by step
            `warmup - 1`, the final rate by step `max_steps - 1`.
        warmup_ratio: share of `max_steps` that warms up.
    """
    warmup = math.ceil(warmup_ratio * max_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, max_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_lr_ratio + (1.0 - min_lr_ratio) * cosine)
