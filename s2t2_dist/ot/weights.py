"""E and L in target tokens: the formula of E' and L', and the rows that a plan translates.

Shapes: V source rows, U target tokens, D model width.
"""

import torch


def weight_factors(
    weight: str, embed_scale: str, mu_V: torch.Tensor, nu_U: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The one formula of E' and L': X' = after * P^T (before * X), with X = E or L.

    E' = (P^T * 1/mu) E and L' = (P * 1/nu)^T L (paper, section 2).

    Args:
        weight: "embed" (E) or "head" (L).
        embed_scale: "paper" as above; "convex" takes 1/nu for E too: rows of E' are then averages
            of rows of E.
        mu_V, nu_U: positive marginals of P, in its units.

    Returns:
        before and after: factors of rows, (V, 1) and (U, 1) float32; 1.0 where there is none.
    """
    if weight == "embed" and embed_scale == "paper":
        return 1 / mu_V.float()[:, None], 1.0
    return 1.0, 1 / nu_U.float()[:, None]


def translated_rows(
    embed_VD: torch.Tensor,
    head_VD: torch.Tensor,
    factor: torch.Tensor | float,
    plans: str,
) -> dict[str, torch.Tensor]:
    """What each plan translates, float32: E and L side by side, or one matrix where that does.

    Args:
        embed_VD, head_VD: rows of E and L; the same tensor when tied.
        factor: of the rows of E, (V, 1), or 1.0.
        plans: "shared" or "separate".
    """
    tied, is_one = head_VD is embed_VD, isinstance(factor, float)
    embed_VD, head_VD = embed_VD.detach(), head_VD.detach()
    if tied and is_one and plans == "shared":
        return {"plan": embed_VD.float()}
    embed_VD, head_VD = embed_VD.float(), head_VD.float()
    if not is_one:
        embed_VD = embed_VD * factor
    if plans == "separate":
        return {"embed": embed_VD, "head": head_VD}
    return {"plan": torch.cat((embed_VD, head_VD), 1)}
