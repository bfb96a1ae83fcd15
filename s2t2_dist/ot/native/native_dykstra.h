// The passes of dykstra.py: those of dykstra_passes.py, with an entry's iterates in registers.
// Their row_threshold and col_threshold are the taus and sigmas of the recursion here.

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

// Calls rows(i, Constant<R>), with i from first to last, R rows at a time; and flush after every
// BLOCK rows.
template <typename Rows, typename Flush>
void in_blocks(int64_t first, int64_t last, Rows rows, Flush flush) {
    for (int64_t begin = first; begin < last; begin += BLOCK) {
        int64_t i = begin;
        const int64_t end = std::min(begin + BLOCK, last);
        for (; i + TOGETHER <= end; i += TOGETHER) rows(i, Constant<TOGETHER>{});
        for (; i < end; ++i) rows(i, Constant<1>{});
        flush();
    }
}

// Of one entry, Z_{K+1} and W_K from Z_K and W_{K-1}. tau: the row's thresholds; sigma: the
// column's, each `stride` after the one before.
template <int K, typename T>
INLINE void step(const T* tau, const T* sigma, int64_t stride, T& z, T& w) {
    const T p = least(z, tau[K]);
    T y = z - p;
    if constexpr (K > 0) y += least(w, sigma[(K - 1) * stride]);
    w = y;
    z = over(w, sigma[K * stride]) + p;
}

// Of one entry, Z_K and W_{K-1} from z = Z_0.
template <int K, typename T>
INLINE void iterate(const T* tau, const T* sigma, int64_t stride, T& z, T& w) {
    if constexpr (K > 0) {
        iterate<K - 1>(tau, sigma, stride, z, w);
        step<K - 1>(tau, sigma, stride, z, w);
    }
}

// Of one entry, W_K. (The Z_{K+1} of the same step, and sigma_K, are not used: no code is made.)
template <int K, typename T>
INLINE T last_w(const T* tau, const T* sigma, int64_t stride, T z) {
    T w = 0;
    iterate<K + 1>(tau, sigma, stride, z, w);
    return w;
}

// Adds R rows of W_K, whose entries are w(r, j), to the counts and excesses of the columns above
// their thresholds, and with TOTAL to the sums of all.
template <int R, bool TOTAL, typename T, typename Entry>
void add_rows(int64_t U, const T* __restrict threshold, Count<T>* __restrict count,
              T* __restrict excess, T* __restrict total, Entry w) {
#pragma omp simd
    for (int64_t j = 0; j < U; ++j) {
        Count<T> number = 0;
        T sum = 0, all = 0;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T entry = w(r, j);
            number += entry > threshold[j];
            sum += over(entry, threshold[j]);
            all += entry;
        }
        count[j] += number;
        excess[j] += sum;
        if constexpr (TOTAL) total[j] += all;
    }
}

// search, of R rows from the i-th on. z and q: (R, U), for Z_K and the columns' correction
// min(W_{K-1}, sigma_{K-1}).
template <int K, int R, typename T>
void search_rows(const Solve<T>& solve, int64_t i, T* taus, T* shift, const double* mu,
                 double* row_counts, const T* col_guess, T* __restrict z, T* __restrict q, T& gap,
                 ColumnSums<Count<T>>& count, ColumnSums<T>& excess, ColumnSums<T>& total) {
    const int64_t V = solve.V, U = solve.U;
    const T* __restrict sigmas = solve.sigmas;
    T last[R];
    for (int r = 0; r < R; ++r) {
        const T* __restrict c = solve.cost + (i + r) * U;
        look_ahead(c + AHEAD * U, U);
        if (K == 0) shift[i + r] = largest(c, U);
        const T above = shift[i + r];
        T tau[K + 1];
        solve.thresholds(i + r, tau);  // the last is the guess
        T top = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < U; ++j) {
            T x = c[j] - above, w = 0;
            iterate<K>(tau, sigmas + j, U, x, w);
            z[r * U + j] = x;
            if constexpr (K > 0) q[r * U + j] = least(w, sigmas[(K - 1) * U + j]);
            top = x > top ? x : top;
        }
        const T guess = std::isinf(tau[K]) ? top - gap : tau[K];
        last[r] = search_row(z + r * U, U, top, mu[i + r], guess, row_counts[i + r]);
        taus[K * V + i + r] = last[r];
        gap = top - last[r];
    }
    add_rows<R, true>(U, col_guess, count.block.data(), excess.block.data(), total.block.data(),
                      [=](int r, int64_t j) {
                          const T y = over(z[r * U + j], last[r]);
                          return K > 0 ? y + q[r * U + j] : y;
                      });
}

// tau_k of every row (from the guesses that taus holds), and the columns' first step.
// shift is made for K = 0. sums (parts, 3, U): count, excess and sum; zeroed by the caller.
template <int K, typename T>
void search(Solve<T> solve, T* taus, T* shift, const double* mu, double* row_counts,
            const T* col_guess, double* sums, int64_t parts) {
    const int64_t U = solve.U;
    in_parallel(solve.V, parts, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> z(TOGETHER * U), q(TOGETHER * U);
        ColumnSums<Count<T>> count(U, sums + 3 * t * U);
        ColumnSums<T> excess(U, sums + (3 * t + 1) * U), total(U, sums + (3 * t + 2) * U);
        T gap = 0;  // from a row's largest entry down to its threshold, in the row before
        in_blocks(
            first, last,
            [&](int64_t i, auto R) {
                search_rows<K, R>(solve, i, taus, shift, mu, row_counts, col_guess, z.data(),
                                  q.data(), gap, count, excess, total);
            },
            [&] { count.flush(), excess.flush(), total.flush(); });
    });
}

// column_sums, of R rows from the i-th on.
template <int K, bool GATHER, int R, typename T>
void column_rows(const Solve<T>& solve, int64_t i, const T* threshold, Count<T>* count, T* excess) {
    const int64_t U = solve.U;
    const T* cost[R];
    T tau[R][K + 1], shift[R];
    for (int r = 0; r < R; ++r) {
        cost[r] = solve.cost + (i + r) * solve.row_length;
        look_ahead(cost[r] + R * solve.row_length, solve.row_length);
        shift[r] = solve.shift[i + r];
        solve.thresholds(i + r, tau[r]);
    }
    const T* sigmas = solve.sigmas;
    const int32_t* columns = solve.columns;
    add_rows<R, false>(U, threshold, count, excess, static_cast<T*>(nullptr),
                       [=](int r, int64_t j) {
                           const T c = cost[r][GATHER ? columns[j] : j];
                           return last_w<K>(tau[r], sigmas + j, U, c - shift[r]);
                       });
}

// Counts and excesses of W_K's columns above their thresholds: sums (parts, 2, U).
template <int K, bool GATHER, typename T>
void column_sums(Solve<T> solve, const T* threshold, double* sums, int64_t parts) {
    const int64_t U = solve.U;
    in_parallel(solve.V, parts, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<Count<T>> count(U, sums + 2 * t * U);
        ColumnSums<T> excess(U, sums + (2 * t + 1) * U);
        in_blocks(
            first, last,
            [&](int64_t i, auto R) {
                column_rows<K, GATHER, R>(solve, i, threshold, count.block.data(),
                                          excess.block.data());
            },
            [&] { count.flush(), excess.flush(); });
    });
}

// Rows of the plan after N iterations.
template <int N, typename T>
void plan(Solve<T> solve, int64_t first_row, int64_t rows, T* out, int64_t parts) {
    const int64_t U = solve.U;
    in_parallel(rows, parts, [=](int64_t, int64_t first, int64_t last) {
        const T* __restrict sigmas = solve.sigmas;
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict c = solve.cost + (first_row + i) * U;
            look_ahead(c + AHEAD * U, U);
            T* __restrict p = out + i * U;
            const T top = solve.shift[first_row + i];
            T tau[N];
            solve.thresholds(first_row + i, tau);
            for (int64_t j = 0; j < U; ++j) {
                const T w = last_w<N - 1>(tau, sigmas + j, U, c[j] - top);
                p[j] = over(w, sigmas[(N - 1) * U + j]);
            }
        }
    });
}

// What supports says of Z_k > tau_k and of W_k > sigma_k.
template <typename T>
constexpr Count<T> row_bit(int k) {
    return Count<T>(1) << 2 * k;
}
template <typename T>
constexpr Count<T> column_bit(int k) {
    return Count<T>(2) << 2 * k;
}

// The supports of one entry, from z = Z_0 and w = 0: a bit each. As wide as an entry, because a
// loop that mixes widths packs and unpacks at every step.
template <int N, typename T>
INLINE Count<T> supports(const T* tau, const T* sigma, int64_t stride, T& z, T& w) {
    if constexpr (N == 0) {
        return 0;
    } else {
        Count<T> on = supports<N - 1>(tau, sigma, stride, z, w);
        on |= z > tau[N - 1] ? row_bit<T>(N - 1) : 0;
        step<N - 1>(tau, sigma, stride, z, w);
        return on | (w > sigma[(N - 1) * stride] ? column_bit<T>(N - 1) : 0);
    }
}

// Those of row i.
template <int N, typename T>
void row_supports(const Solve<T>& solve, int64_t i, Count<T>* __restrict on) {
    const int64_t U = solve.U;
    const T* __restrict c = solve.cost + i * U;
    const T* __restrict sigmas = solve.sigmas;
    look_ahead(c + AHEAD * U, U);
    const T top = solve.shift[i];
    T tau[N];
    solve.thresholds(i, tau);
    for (int64_t j = 0; j < U; ++j) {
        T z = c[j] - top, w = 0;
        on[j] = supports<N>(tau, sigmas + j, U, z, w);
    }
}

// Of one entry, the gradients of the column step of iteration k = N - 1 - D: what _back_pass of
// dykstra_passes.py calls gw, from gx and gq after D iterations were undone.
template <int N, int D, typename T>
INLINE T undo_column(Count<T> on, const T* col_mean, int64_t stride, T gx, T gq) {
    return gq + (on & column_bit<T>(N - 1 - D) ? gx - gq - col_mean[D * stride] : T(0));
}

// The same of the row step after it.
template <int N, int D, typename T>
INLINE T undo_row(Count<T> on, T mean, T gw, T gp) {
    return (on & row_bit<T>(N - 1 - D) ? gw - gp - mean : T(0)) + gp;
}

// gx (which is gp too after the first iteration) and gq after DONE iterations are undone.
template <int N, int DONE, typename T>
INLINE void undo(Count<T> on, const T* col_mean, const T* row_mean, int64_t stride, T& gx, T& gq) {
    if constexpr (DONE > 0) {
        constexpr int D = DONE - 1;
        undo<N, D>(on, col_mean, row_mean, stride, gx, gq);
        const T gw = undo_column<N, D>(on, col_mean, stride, gx, gq);
        gx = undo_row<N, D>(on, row_mean[D], gw, D ? gx : T(0));
        gq = gw;
    }
}

// See _back_pass in dykstra_passes.py; KNOWN iterations' column means are known. row_means (n, V) in the
// order in which they are made; the last known one is made here. sums (parts, U). out: where the
// last pass writes; it may be grad. Otherwise each row of it keeps its supports until then, a byte
// each; in place they are found again, because memory for them would cost more, in page faults.
template <int N, int KNOWN, typename T>
void backward(Solve<T> solve, const T* grad, T* out, const T* col_means, T* row_means,
              const double* row_counts, double* sums, int64_t parts) {
    const int64_t V = solve.V, U = solve.U;
    const bool keep = out != grad;
    in_parallel(V, parts, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<Count<T>> supported(U);
        std::vector<T> gws(U), gps(U);
        ColumnSums<T> sum(U, sums + t * U);
        T* __restrict block = sum.block.data();
        T* __restrict gw = gws.data();
        T* __restrict gp = gps.data();
        Count<T>* __restrict on = supported.data();
        const T* __restrict means = col_means;
        for (int64_t i = first; i < last; ++i) {
            const T* g = grad + i * U;
            T* o = out + i * U;
            uint8_t* kept = reinterpret_cast<uint8_t*>(o);
            look_ahead(g + AHEAD * U, U);
            if (KNOWN > 0 && keep) {
                look_ahead(kept + AHEAD * U * sizeof(T), U);
                for (int64_t j = 0; j < U; ++j) on[j] = kept[j];
            } else {
                row_supports<N>(solve, i, on);
                if (keep)
                    for (int64_t j = 0; j < U; ++j) kept[j] = uint8_t(on[j]);
            }
            if constexpr (KNOWN == 0) {
                for (int64_t j = 0; j < U; ++j)
                    block[j] += on[j] & column_bit<T>(N - 1) ? g[j] : T(0);
            } else {
                constexpr int D = KNOWN - 1, k = N - 1 - D;
                T mean[N];
                for (int d = 0; d < D; ++d) mean[d] = row_means[d * V + i];
                const double total = row_sum<T>(U, [=](int64_t j) {
                    T gx = g[j], gq = 0;
                    undo<N, D>(on[j], means + j, mean, U, gx, gq);
                    gw[j] = undo_column<N, D>(on[j], means + j, U, gx, gq);
                    gp[j] = D ? gx : T(0);
                    return on[j] & row_bit<T>(k) ? gw[j] - gp[j] : T(0);
                });
                const T last_mean = row_means[D * V + i] = T(total / row_counts[k * V + i]);
                for (int64_t j = 0; j < U; ++j) {
                    const T gx = undo_row<N, D>(on[j], last_mean, gw[j], gp[j]);
                    if constexpr (KNOWN == N)
                        o[j] = gx;
                    else
                        block[j] += on[j] & column_bit<T>(k - 1) ? gx - gw[j] : T(0);
                }
            }
            if ((i - first + 1) % BLOCK == 0) sum.flush();
        }
        sum.flush();
    });
}

}  // namespace
