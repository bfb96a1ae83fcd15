// The solvers' passes over a matrix's rows on a CPU, one sweep each: what Python calls. The iterates
// of an entry live in registers, because their number is a template's argument. The same numbers as
// torch's up to the order of sums. Names and shapes are theirs: V rows, U columns, n iterations,
// row-major matrices.
// Compiled for one floating-point type at a time: -DREAL=float or double.

#include <omp.h>

#include "native_dual.h"
#include "native_dykstra.h"
#include "native_plan.h"

extern "C" {

void s2t2_set_threads(int64_t threads) { omp_set_num_threads(int(threads)); }

void s2t2_search(const REAL* cost, int64_t V, int64_t U, REAL* shift, REAL* taus,
                 const REAL* sigmas, int64_t k, const double* mu, double* row_counts,
                 const REAL* col_guess, double* sums, int64_t parts) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(k, [=](auto K) {
        if constexpr (K < MOST)
            search<K>(solve, taus, shift, mu, row_counts, col_guess, sums, parts);
    });
}

void s2t2_column_sums(const REAL* cost, int64_t V, int64_t U, int64_t row_length, const REAL* shift,
                      const REAL* taus, const REAL* sigmas, const int32_t* columns, int64_t k,
                      const REAL* threshold, double* sums, int64_t parts) {
    const Solve<REAL> solve{cost, V, U, row_length, shift, taus, sigmas, columns};
    with_constant(k, [=](auto K) {
        if constexpr (K < MOST)
            columns ? column_sums<K, true>(solve, threshold, sums, parts)
                    : column_sums<K, false>(solve, threshold, sums, parts);
    });
}

void s2t2_plan(const REAL* cost, int64_t V, int64_t U, const REAL* shift, const REAL* taus,
               const REAL* sigmas, int64_t n, int64_t first_row, int64_t rows, REAL* out,
               int64_t parts) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(n, [=](auto N) {
        if constexpr (N > 0) plan<N>(solve, first_row, rows, out, parts);
    });
}

void s2t2_backward(const REAL* cost, int64_t V, int64_t U, const REAL* shift, const REAL* taus,
                   const REAL* sigmas, int64_t n, int64_t known, const REAL* grad, REAL* out,
                   const REAL* col_means, REAL* row_means, const double* row_counts, double* sums,
                   int64_t parts) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(n, [=](auto N) {
        with_constant(known, [=](auto KNOWN) {
            if constexpr (N > 0 && KNOWN <= N)
                backward<N, KNOWN>(solve, grad, out, col_means, row_means, row_counts, sums, parts);
        });
    });
}

void s2t2_dual_rows(const REAL* cost, int64_t V, int64_t U, const REAL* shift, REAL* potentials,
                    const REAL* col, const double* mu, REAL* errors, REAL* tops, double* sums,
                    int64_t parts) {
    dual_rows(cost, V, U, shift, potentials, col, mu, errors, tops, sums, parts);
}

void s2t2_dual_columns(const REAL* cost, int64_t V, int64_t U, int64_t row_length,
                       const REAL* shift, const REAL* row, const REAL* col, const int32_t* columns,
                       double* sums, int64_t parts) {
    const Solve<REAL> solve{cost, V, U, row_length, shift, row, nullptr, columns};
    columns ? dual_columns<true>(solve, col, sums, parts)
            : dual_columns<false>(solve, col, sums, parts);
}

void s2t2_plan_sums(const REAL* plan, int64_t V, int64_t U, double* row_sums, double* col_sums,
                    double* support, int64_t parts) {
    plan_sums(plan, V, U, row_sums, col_sums, support, parts);
}

}  // extern "C"
