// Over tiles of a plan: its sums, and the products of products.py through its support.

#pragma once

#include "native_common.h"

namespace {

constexpr int64_t CHUNK = 256;  // columns of X and Y at a time, so that those of Y stay in cache

// The columns of a row's entries that are not 0; returns how many.
template <typename T>
int64_t not_zero(const T* p, int64_t U, int32_t* columns) {
    int64_t count = 0;
    for (int64_t j = 0; j < U; ++j) {
        columns[count] = int32_t(j);
        count += p[j] != 0;
    }
    return count;
}

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

// Y += P^T X: the entries of P that are not 0, each with a part of a row of X that stays in cache.
// P (h, U), X (h, K), Y (U, K). Each part has columns of Y to itself.
template <typename T>
void add_product(const T* plan, const T* values, T* total, int64_t h, int64_t U, int64_t K) {
    const int64_t chunks = (K + CHUNK - 1) / CHUNK;
    in_parallel(chunks, chunks, [=](int64_t chunk, int64_t, int64_t) {
        std::vector<int32_t> columns(U);
        const int64_t first = chunk * CHUNK, width = std::min(CHUNK, K - first);
        for (int64_t i = 0; i < h; ++i) {
            const T* __restrict p = plan + i * U;
            const T* __restrict x = values + i * K + first;
            const int64_t count = not_zero(p, U, columns.data());
            for (int64_t q = 0; q < count; ++q) {
                const int64_t j = columns[q];
                T* __restrict y = total + j * K + first;
                const T weight = p[j];
                for (int64_t k = 0; k < width; ++k) y[k] += weight * x[k];
            }
        }
    });
}

// G = X Y'^T where P is not 0, and 0 elsewhere; Y' (U, K) is dloss/dY, G (h, U).
template <typename T>
void product_grad(const T* plan, const T* values, const T* grad, T* out, int64_t h, int64_t U,
                  int64_t K, int64_t parts) {
    in_parallel(h, parts, [=](int64_t, int64_t from, int64_t to) {
        std::vector<int32_t> columns(U);
        std::fill(out + from * U, out + to * U, T(0));
        for (int64_t first = 0; first < K; first += CHUNK) {
            const int64_t width = std::min(CHUNK, K - first);
            for (int64_t i = from; i < to; ++i) {
                const T* __restrict x = values + i * K + first;
                const int64_t count = not_zero(plan + i * U, U, columns.data());
                for (int64_t q = 0; q < count; ++q) {
                    const T* __restrict y = grad + columns[q] * K + first;
                    T sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t k = 0; k < width; ++k) sum += x[k] * y[k];
                    out[i * U + columns[q]] += sum;
                }
            }
        }
    });
}

}  // namespace
