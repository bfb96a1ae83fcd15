// The passes of dual.py.

#pragma once

#include "native_common.h"

namespace {

// The dual method's row step: the potential of every row (from the guess that `potentials` holds).
// errors (threads): the largest relative error of a row sum under the guesses. Of the columns under
// the new ones: tops (threads, U), the largest entry; sums (threads, 2, U), counts and excesses.
template <typename T>
void dual_rows(const T* cost, int64_t V, int64_t U, const T* shift, T* potentials, const T* col,
               const double* mu, T* errors, T* tops, double* sums, int64_t threads) {
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> row(U);
        T* __restrict z = row.data();
        T* __restrict top = tops + t * U;
        ColumnSums<T> count(U, sums + 2 * t * U), excess(U, sums + (2 * t + 1) * U);
        T *__restrict numbers = count.block.data(), *__restrict overs = excess.block.data();
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
                const T below = (c[j] - largest_cost) - a, over = below - col[j];
                top[j] = below > top[j] ? below : top[j];
                numbers[j] += over > 0 ? T(1) : T(0);
                overs[j] += relu(over);
            }
            if ((i - first + 1) % BLOCK == 0) count.flush(), excess.flush();
        }
        count.flush(), excess.flush();
    });
}

// The dual method's counts and excesses of columns above their potentials: sums (threads, 2, U).
template <bool GATHER, typename T>
void dual_columns(Solve<T> solve, const T* col, double* sums, int64_t threads) {
    const int64_t U = solve.U;
    in_parallel(solve.V, threads, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<T> count(U, sums + 2 * t * U), excess(U, sums + (2 * t + 1) * U);
        T *__restrict numbers = count.block.data(), *__restrict overs = excess.block.data();
        const int32_t* __restrict columns = solve.columns;
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = solve.cost + i * solve.row_length;
            const T top = solve.shift[i], row = solve.taus[i];
            for (int64_t j = 0; j < U; ++j) {
                const T over = ((GATHER ? c[columns[j]] : c[j]) - top) - row - col[j];
                numbers[j] += over > 0 ? T(1) : T(0);
                overs[j] += relu(over);
            }
            if ((i - first + 1) % BLOCK == 0) count.flush(), excess.flush();
        }
        count.flush(), excess.flush();
    });
}

}  // namespace
