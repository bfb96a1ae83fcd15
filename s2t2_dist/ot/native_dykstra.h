// The passes of dykstra.py: those of passes.py, with an entry's iterates in registers.

#pragma once

#include "native_common.h"

namespace {

constexpr int MOST = 4;      // iterations n: a byte holds the supports of as many
constexpr int TOGETHER = 2;  // rows that share the loads of what belongs to a column

template <int K>
using Constant = std::integral_constant<int, K>;

// Calls f(Constant<k>), for k from 0 to MOST.
template <typename F>
void with_constant(int64_t k, F f) {
    switch (k) {
        case 0: return f(Constant<0>{});
        case 1: return f(Constant<1>{});
        case 2: return f(Constant<2>{});
        case 3: return f(Constant<3>{});
        case 4: return f(Constant<4>{});
    }
}

// Of one entry, Z_K and W_{K-1} from z = Z_0. tau: the row's thresholds; sigma: the column's, each
// `stride` after the one before.
template <int K, typename T>
INLINE void iterate(const T* tau, const T* sigma, int64_t stride, T& z, T& w) {
    if constexpr (K > 0) {
        iterate<K - 1>(tau, sigma, stride, z, w);
        const T y = relu(z - tau[K - 1]);
        if constexpr (K > 1)
            w = y + least(w, sigma[(K - 2) * stride]);
        else
            w = y;
        z = relu(w - sigma[(K - 1) * stride]) + least(z, tau[K - 1]);
    }
}

// Of one entry, W_K.
template <int K, typename T>
INLINE T last_w(const T* tau, const T* sigma, int64_t stride, T z) {
    T w = 0;
    iterate<K>(tau, sigma, stride, z, w);
    const T y = relu(z - tau[K]);
    if constexpr (K > 0)
        return y + least(w, sigma[(K - 1) * stride]);
    else
        return y;
}

// Adds rows i..i+R of W_K to the counts and excesses of the columns above their thresholds, and
// where total is given to the sums of all.
template <int K, int R, bool GATHER, typename T>
void add_columns(const Solve<T>& solve, int64_t i, const T* __restrict threshold,
                 T* __restrict count, T* __restrict excess, T* __restrict total) {
    const T* cost[R];
    T tau[R][K + 1], shift[R];
    for (int r = 0; r < R; ++r) {
        cost[r] = solve.cost + (i + r) * solve.row_length;
        shift[r] = solve.shift[i + r];
        solve.thresholds(i + r, tau[r]);
    }
    const int64_t U = solve.U;
    const T* __restrict sigmas = solve.sigmas;
    for (int64_t j = 0; j < U; ++j) {
        T number = 0, sum = 0, all = 0;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T c = GATHER ? cost[r][solve.columns[j]] : cost[r][j];
            const T w = last_w<K>(tau[r], sigmas + j, U, c - shift[r]);
            const T over = w - threshold[j];
            number += over > 0 ? T(1) : T(0);
            sum += relu(over);
            all += w;
        }
        count[j] += number;
        excess[j] += sum;
        if constexpr (!GATHER)
            if (total) total[j] += all;
    }
}

// The same for up to BLOCK rows.
template <int K, bool GATHER, typename T>
void add_block(const Solve<T>& solve, int64_t first, int64_t last, const T* threshold,
               ColumnSums<T>& count, ColumnSums<T>& excess, ColumnSums<T>* total) {
    T *numbers = count.block.data(), *sums = excess.block.data();
    T* all = total ? total->block.data() : nullptr;
    int64_t i = first;
    for (; i + TOGETHER <= last; i += TOGETHER) {
        look_ahead(solve.cost + (i + TOGETHER) * solve.row_length, TOGETHER * solve.row_length);
        add_columns<K, TOGETHER, GATHER>(solve, i, threshold, numbers, sums, all);
    }
    for (; i < last; ++i) add_columns<K, 1, GATHER>(solve, i, threshold, numbers, sums, all);
    count.flush(), excess.flush();
    if (total) total->flush();
}

// tau_k of every row (from the guesses that taus holds), and the columns' first step.
// shift is made for K = 0. sums (threads, 3, U): count, excess and sum; zeroed by the caller.
template <int K, typename T>
void search(Solve<T> solve, T* taus, T* shift, const double* mu, double* row_counts,
            const T* col_guess, double* sums, int64_t threads) {
    const int64_t V = solve.V, U = solve.U;
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> row(U);
        T* __restrict z = row.data();
        const T* __restrict sigmas = solve.sigmas;
        ColumnSums<T> count(U, sums + 3 * t * U), excess(U, sums + (3 * t + 1) * U),
            total(U, sums + (3 * t + 2) * U);
        T gap = 0;  // from a row's largest entry down to its threshold, in the row before
        for (int64_t begin = first; begin < last; begin += BLOCK) {
            const int64_t end = std::min(begin + BLOCK, last);
            for (int64_t i = begin; i < end; ++i) {
                const T* __restrict c = solve.cost + i * U;
                look_ahead(c + AHEAD * U, U);
                if (K == 0) shift[i] = largest(c, U);
                const T above = shift[i];
                T tau[K + 1];
                solve.thresholds(i, tau);  // the last is the guess
                T top = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : top)
                for (int64_t j = 0; j < U; ++j) {
                    T x = c[j] - above, w = 0;
                    iterate<K>(tau, sigmas + j, U, x, w);
                    z[j] = x;
                    top = x > top ? x : top;
                }
                const T guess = std::isinf(tau[K]) ? top - gap : tau[K];
                taus[K * V + i] = search_row(z, U, top, mu[i], guess, row_counts[i]);
                gap = top - taus[K * V + i];
            }
            add_block<K, false>(solve, begin, end, col_guess, count, excess, &total);
        }
    });
}

// Counts and excesses of W_K's columns above their thresholds: sums (threads, 2, U).
template <int K, bool GATHER, typename T>
void column_sums(Solve<T> solve, const T* threshold, double* sums, int64_t threads) {
    const int64_t U = solve.U;
    in_parallel(solve.V, threads, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<T> count(U, sums + 2 * t * U), excess(U, sums + (2 * t + 1) * U);
        for (int64_t i = first; i < last; i += BLOCK)
            add_block<K, GATHER>(solve, i, std::min(i + BLOCK, last), threshold, count, excess,
                                 static_cast<ColumnSums<T>*>(nullptr));
    });
}

// Rows of the plan after N iterations.
template <int N, typename T>
void plan(Solve<T> solve, int64_t first_row, int64_t rows, T* out, int64_t threads) {
    const int64_t U = solve.U;
    in_parallel(rows, threads, [=](int64_t, int64_t first, int64_t last) {
        const T* __restrict sigmas = solve.sigmas;
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = solve.cost + (first_row + i) * U;
            look_ahead(c + AHEAD * U, U);
            T* __restrict p = out + i * U;
            const T top = solve.shift[first_row + i];
            T tau[N];
            solve.thresholds(first_row + i, tau);
            for (int64_t j = 0; j < U; ++j)
                p[j] = relu(last_w<N - 1>(tau, sigmas + j, U, c[j] - top) - sigmas[(N - 1) * U + j]);
        }
    });
}

// The supports of one entry: bit 2 q says Z_q > tau_q and bit 2 q + 1 says W_q > sigma_q.
template <int N, typename T>
INLINE int supports(const T* tau, const T* sigma, int64_t stride, T z) {
    T w = 0;
    int on = 0;
    if constexpr (N > 0) {
        on = supports<N - 1>(tau, sigma, stride, z);
        iterate<N - 1>(tau, sigma, stride, z, w);
        on |= z > tau[N - 1] ? 1 << 2 * (N - 1) : 0;
        T last = relu(z - tau[N - 1]);
        if constexpr (N > 1) last += least(w, sigma[(N - 2) * stride]);
        on |= last > sigma[(N - 1) * stride] ? 2 << 2 * (N - 1) : 0;
    }
    return on;
}

// Of one entry, the gradients of the column step of iteration k = N - 1 - D: what _back_pass of
// passes.py calls gw, from gx and gq after D iterations were undone.
template <int N, int D, typename T>
INLINE T undo_column(int on, const T* col_mean, int64_t stride, T gx, T gq) {
    return gq + (on & 2 << 2 * (N - 1 - D) ? gx - gq - col_mean[D * stride] : T(0));
}

// gx (which is gp too after the first iteration) and gq after DONE iterations are undone.
template <int N, int DONE, typename T>
INLINE void undo(int on, const T* col_mean, const T* row_mean, int64_t stride, T& gx, T& gq) {
    if constexpr (DONE > 0) {
        constexpr int D = DONE - 1;
        undo<N, D>(on, col_mean, row_mean, stride, gx, gq);
        const T gp = D ? gx : T(0), gw = undo_column<N, D>(on, col_mean, stride, gx, gq);
        gx = (on & 1 << 2 * (N - 1 - D) ? gw - gp - row_mean[D] : T(0)) + gp;
        gq = gw;
    }
}

// See _back_pass in passes.py; KNOWN iterations' column means are known. row_means (n, V) in the
// order in which they are made; the last known one is made here. sums (threads, U). out: where the
// last pass writes; it may be grad. Otherwise each row of it keeps its supports until then, a byte
// each; in place they are found again, because memory for them would cost more, in page faults.
template <int N, int KNOWN, typename T>
void backward(Solve<T> solve, const T* grad, T* out, const T* col_means, T* row_means,
              const double* row_counts, double* sums, int64_t threads) {
    const int64_t V = solve.V, U = solve.U;
    const bool keep = out != grad;
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<uint8_t> row(U);
        ColumnSums<T> sum(U, sums + t * U);
        T* __restrict block = sum.block.data();
        const T *__restrict sigmas = solve.sigmas, *__restrict means = col_means;
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = solve.cost + i * U;
            const T* g = grad + i * U;
            T* o = out + i * U;
            uint8_t* __restrict mask = row.data();
            look_ahead(g + AHEAD * U, U);
            if (KNOWN > 0 && keep) {
                const uint8_t* kept = reinterpret_cast<const uint8_t*>(o);
                look_ahead(kept + AHEAD * U * sizeof(T), U);
                std::copy(kept, kept + U, mask);
            } else {
                look_ahead(c + AHEAD * U, U);
                const T top = solve.shift[i];
                T tau[N];
                solve.thresholds(i, tau);
                for (int64_t j = 0; j < U; ++j)
                    mask[j] = uint8_t(supports<N>(tau, sigmas + j, U, c[j] - top));
                if (keep) std::copy(mask, mask + U, reinterpret_cast<uint8_t*>(o));
            }
            T mean[N];
            for (int d = 0; d + 1 < KNOWN; ++d) mean[d] = row_means[d * V + i];
            if constexpr (KNOWN > 0) {
                constexpr int D = KNOWN - 1, k = N - 1 - D;
                const double total = row_sum<T>(U, [=](int64_t j) {
                    T gx = g[j], gq = 0;
                    const int on = mask[j];
                    undo<N, D>(on, means + j, mean, U, gx, gq);
                    const T gw = undo_column<N, D>(on, means + j, U, gx, gq);
                    return on & 1 << 2 * k ? gw - (D ? gx : T(0)) : T(0);
                });
                mean[D] = row_means[D * V + i] = T(total / row_counts[k * V + i]);
            }
#pragma omp simd
            for (int64_t j = 0; j < U; ++j) {
                T gx = g[j], gq = 0;
                const int on = mask[j];
                undo<N, KNOWN>(on, means + j, mean, U, gx, gq);
                if constexpr (KNOWN == N)
                    o[j] = gx;
                else
                    block[j] += on & 2 << 2 * (N - 1 - KNOWN) ? gx - gq : T(0);
            }
            if ((i - first + 1) % BLOCK == 0) sum.flush();
        }
        sum.flush();
    });
}

}  // namespace
