"""Optimal transport between vocabularies: simplex projections, Sinkhorn solvers, the translator."""

from s2t2_dist.ot.simplex import project_simplex
from s2t2_dist.ot.sinkhorn import SinkhornResult, sparse_sinkhorn

__all__ = ["SinkhornResult", "project_simplex", "sparse_sinkhorn"]
