// The sums over a tile of a plan, of sums.py.

#pragma once

#include "native_common.h"

namespace {

// Sums over a plan: of each row; of each column (parts, U); and the entries that are not 0
// (parts).
template <typename T>
void plan_sums(const T* plan, int64_t V, int64_t U, double* row_sums, double* col_sums,
               double* support, int64_t parts) {
    in_parallel(V, parts, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<T> sum(U, col_sums + t * U);
        T* __restrict block = sum.block.data();
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict p = plan + i * U;
            row_sums[i] = row_sum<T>(U, [=](int64_t j) {
                block[j] += p[j];
                return p[j];
            });
            support[t] += row_sum<T>(U, [=](int64_t j) { return p[j] != 0 ? T(1) : T(0); });
            if ((i - first + 1) % BLOCK == 0) sum.flush();
        }
        sum.flush();
    });
}

}  // namespace
