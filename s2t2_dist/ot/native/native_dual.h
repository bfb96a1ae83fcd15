// The searches of dual_passes.py.

#pragma once

#include "native_common.h"

namespace {

// The dual method's row step: the potential of every row (from the guess that `potentials` holds).
// errors (parts): the largest relative error of a row sum under the guesses. Of the columns under
// the new ones: tops (parts, U), the largest entry; sums (parts, 2, U), counts and excesses.
template <typename T>
void dual_rows(const T* cost, int64_t V, int64_t U, const T* shift, T* potentials, const T* col,
               const double* mu, T* errors, T* tops, double* sums, int64_t parts) {
    in_parallel(V, parts, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> row(U);
        T* __restrict z = row.data();
        T* __restrict top = tops + t * U;
        ColumnSums<Count<T>> count(U, sums + 2 * t * U);
        ColumnSums<T> excess(U, sums + (2 * t + 1) * U);
        Count<T>* __restrict numbers = count.block.data();
        T* __restrict excesses = excess.block.data();
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = cost + i * U;
            const T largest_cost = shift[i];
            for (int64_t j = 0; j < U; ++j) z[j] = (c[j] - largest_cost) - col[j];
            double number, sum;
            count_and_excess(z, U, potentials[i], number, sum);
            errors[t] = std::max(errors[t], T(std::abs(sum - mu[i]) / mu[i]));
            const T above = largest(z, U);
            const T a = potentials[i] = search_row(z, U, above, mu[i], potentials[i], number);
            for (int64_t j = 0; j < U; ++j) {
                const T entry = (c[j] - largest_cost) - a;
                top[j] = entry > top[j] ? entry : top[j];
                numbers[j] += entry > col[j];
                excesses[j] += over(entry, col[j]);
            }
            if ((i - first + 1) % BLOCK == 0) count.flush(), excess.flush();
        }
        count.flush(), excess.flush();
    });
}

// The dual method's counts and excesses of columns above their potentials: sums (parts, 2, U).
template <bool GATHER, typename T>
void dual_columns(Solve<T> solve, const T* col, double* sums, int64_t parts) {
    const int64_t U = solve.U;
    in_parallel(solve.V, parts, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<Count<T>> count(U, sums + 2 * t * U);
        ColumnSums<T> excess(U, sums + (2 * t + 1) * U);
        Count<T>* __restrict numbers = count.block.data();
        T* __restrict excesses = excess.block.data();
        const int32_t* __restrict columns = solve.columns;
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = solve.cost + i * solve.row_length;
            const T top = solve.shift[i], row = solve.taus[i];
            for (int64_t j = 0; j < U; ++j) {
                const T entry = ((GATHER ? c[columns[j]] : c[j]) - top) - row;
                numbers[j] += entry > col[j];
                excesses[j] += over(entry, col[j]);
            }
            if ((i - first + 1) % BLOCK == 0) count.flush(), excess.flush();
        }
        count.flush(), excess.flush();
    });
}

}  // namespace
