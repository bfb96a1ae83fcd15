"""Optimal transport between vocabularies: simplex projections, Sinkhorn solvers, the translator."""

from s2t2_dist.ot.simplex import project_simplex
from s2t2_dist.ot.sinkhorn import SinkhornResult, sparse_sinkhorn
from s2t2_dist.ot.translator import Translated, Translator, row_range

__all__ = [
    "SinkhornResult",
    "Translated",
    "Translator",
    "project_simplex",
    "row_range",
    "sparse_sinkhorn",
]
