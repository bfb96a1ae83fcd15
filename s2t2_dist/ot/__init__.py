"""Optimal transport between vocabularies: from a cost matrix C to a plan P, and back to dloss/dC.

The room knows tensors and the ranks that share their rows (`comm`); it knows no recipe and no
model, and refuses wrong input with a ValueError. Read it in this order:

1. `simplex`: the projection that every sparse solver repeats, and its threshold search.
2. `problem`: the interface. A solver is a value; `solver.solve(problem)` is a solution, with rows
   of P, the gradient, thresholds for a warm start and a status.
3. `dykstra` (the paper's Algorithm 1), `dual` (its limit) and `dual_gradient`, `entropic`, `plain`:
   one solver each. The passes over C are in `dykstra_passes` and `dual_passes`, for any device,
   in `native/`, in C++ for a CPU, and in `kernels/`, in Triton for a GPU; `tiles` cuts C.
4. `sinkhorn`: a plan as a differentiable function of C, and the names of the methods.
5. `weights`: the formula of E' and L' (paper, section 2); `translator`: C as a parameter, E' and
   L' from P; `sums`: its statistics.
6. `sizes`: memory and traffic of all that, by arithmetic.
"""

from s2t2_dist.ot.problem import Thresholds
from s2t2_dist.ot.simplex import project_simplex
from s2t2_dist.ot.sinkhorn import METHODS, SinkhornResult, make_solver, sparse_sinkhorn
from s2t2_dist.ot.translator import Translator, row_range
from s2t2_dist.ot.weights import weight_factors

__all__ = [
    "METHODS",
    "SinkhornResult",
    "Thresholds",
    "Translator",
    "make_solver",
    "project_simplex",
    "row_range",
    "sparse_sinkhorn",
    "weight_factors",
]
