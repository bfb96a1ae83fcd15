// The passes over a matrix's rows on a CPU: those of passes.py for dykstra.py, those of dual.py, and
// the products and sums over a plan. One sweep each; the iterates of an entry live in registers,
// because their number is a template's argument. The same numbers as torch's up to the order of
// sums. Names and shapes are theirs: V rows, U columns, n iterations, row-major matrices.
// Compiled for one floating-point type at a time: -DREAL=float or double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

// A loop over entries is only vectorised where all that it calls is inlined.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int MOST = 4;             // iterations n: a byte holds the supports of as many
constexpr int TOGETHER = 4;         // rows that share the loads of what belongs to a column
constexpr int64_t BLOCK = 32;       // rows whose column sums are added up in T before in double
constexpr int64_t ROW_BLOCK = 512;  // entries whose row sum is added up in T before in double
constexpr int64_t CHUNK = 256;      // columns of X and Y at a time, so that those of Y stay in cache

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

template <typename T>
INLINE T relu(T x) {
    return x > 0 ? x : 0;
}

template <typename T>
INLINE T least(T x, T y) {
    return x < y ? x : y;
}

// Calls work(thread, first row, last row) on equal parts of V rows.
template <typename Work>
void in_parallel(int64_t V, int64_t threads, Work work) {
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t)
        others.emplace_back(work, t, V * t / threads, V * (t + 1) / threads);
    work(0, 0, V / threads);
    for (auto& other : others) other.join();
}

// Column sums of many rows: in T over a block, in double over the blocks.
template <typename T>
struct ColumnSums {
    std::vector<T> block;
    double* total;

    ColumnSums(int64_t U, double* total) : block(U), total(total) {}
    void flush() {
        for (size_t j = 0; j < block.size(); ++j) total[j] += block[j], block[j] = 0;
    }
};

// Sum over j of term(j), in T over blocks and in double over those.
template <typename T, typename Term>
double row_sum(int64_t U, Term term) {
    double total = 0;
    for (int64_t first = 0; first < U; first += ROW_BLOCK) {
        const int64_t last = std::min(U, first + ROW_BLOCK);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j) sum += term(j);
        total += sum;
    }
    return total;
}

// Count and excess of the entries of a row above a threshold.
template <typename T>
void count_and_excess(const T* z, int64_t U, T threshold, double& count, double& excess) {
    count = excess = 0;
    for (int64_t first = 0; first < U; first += ROW_BLOCK) {
        const int64_t last = std::min(U, first + ROW_BLOCK);
        T number = 0, sum = 0;
#pragma omp simd reduction(+ : number, sum)
        for (int64_t j = first; j < last; ++j) {
            const T over = z[j] - threshold;
            number += over > 0 ? T(1) : T(0);
            sum += relu(over);
        }
        count += number;
        excess += sum;
    }
}

template <typename T>
T largest(const T* z, int64_t U) {
    T top = z[0];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < U; ++j) top = z[j] > top ? z[j] : top;
    return top;
}

// The threshold at which a row's excess is mu, by Newton's method: see newton_step in simplex.py.
template <typename T>
T search_row(const T* z, int64_t U, double mu, T guess, double& count) {
    const T top = largest(z, U);
    const T ceiling = std::nextafter(top, std::numeric_limits<T>::lowest());
    T floor = std::min(T(top - mu), ceiling);
    T threshold = std::min(std::max(guess, floor), ceiling);
    double before = -1;
    while (true) {
        double excess;
        count_and_excess(z, U, threshold, count, excess);
        if (count == before) return threshold;
        before = count;
        threshold = std::min(std::max(T(threshold + (excess - mu) / count), floor), ceiling);
        floor = threshold;
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

// What a solve has found so far, and the matrix. columns: null, or which columns to look at (then
// sigmas hold those alone, and U is their number).
template <typename T>
struct Solve {
    const T* cost;
    int64_t V, U, row_length;
    const T *shift, *taus, *sigmas;
    const int32_t* columns;

    // The first thresholds of row i.
    template <int COUNT>
    void thresholds(int64_t i, T (&tau)[COUNT]) const {
        for (int q = 0; q < COUNT; ++q) tau[q] = taus[q * V + i];
    }
};

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
    for (; i + TOGETHER <= last; i += TOGETHER)
        add_columns<K, TOGETHER, GATHER>(solve, i, threshold, numbers, sums, all);
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
        for (int64_t begin = first; begin < last; begin += BLOCK) {
            const int64_t end = std::min(begin + BLOCK, last);
            for (int64_t i = begin; i < end; ++i) {
                const T* __restrict c = solve.cost + i * U;
                if (K == 0) shift[i] = largest(c, U);
                const T top = shift[i];
                T tau[K + 1];
                solve.thresholds(i, tau);  // the last is the guess
                for (int64_t j = 0; j < U; ++j) {
                    T x = c[j] - top, w = 0;
                    iterate<K>(tau, sigmas + j, U, x, w);
                    z[j] = x;
                }
                taus[K * V + i] = search_row(z, U, mu[i], tau[K], row_counts[i]);
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
// order in which they are made; the last known one is made here. sums (threads, U). masks: a byte
// per entry with its supports, made where nothing is known yet.
template <int N, int KNOWN, typename T>
void backward(Solve<T> solve, T* grad, const T* col_means, T* row_means, const double* row_counts,
              uint8_t* masks, double* sums, int64_t threads) {
    const int64_t V = solve.V, U = solve.U;
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<T> sum(U, sums + t * U);
        T* __restrict block = sum.block.data();
        const T *__restrict sigmas = solve.sigmas, *__restrict means = col_means;
        for (int64_t i = first; i < last; ++i) {
            uint8_t* __restrict mask = masks + i * U;
            T* __restrict g = grad + i * U;
            if constexpr (KNOWN == 0) {
                const T* __restrict c = solve.cost + i * U;
                T tau[N];
                solve.thresholds(i, tau);
                const T top = solve.shift[i];
                for (int64_t j = 0; j < U; ++j)
                    mask[j] = uint8_t(supports<N>(tau, sigmas + j, U, c[j] - top));
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
            for (int64_t j = 0; j < U; ++j) {
                T gx = g[j], gq = 0;
                const int on = mask[j];
                undo<N, KNOWN>(on, means + j, mean, U, gx, gq);
                if constexpr (KNOWN == N)
                    g[j] = gx;
                else
                    block[j] += on & 2 << 2 * (N - 1 - KNOWN) ? gx - gq : T(0);
            }
            if ((i - first + 1) % BLOCK == 0) sum.flush();
        }
        sum.flush();
    });
}

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
            const T a = potentials[i] = search_row(z, U, mu[i], potentials[i], number);
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

// Sums over a plan: of each row; of each column (threads, U); and the entries that are not 0
// (threads).
template <typename T>
void plan_sums(const T* plan, int64_t V, int64_t U, double* row_sums, double* col_sums,
               double* support, int64_t threads) {
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        ColumnSums<T> sum(U, col_sums + t * U);
        T* __restrict block = sum.block.data();
        for (int64_t i = first; i < last; ++i) {
            const T* __restrict p = plan + i * U;
            row_sums[i] = row_sum<T>(U, [=](int64_t j) { return p[j]; });
            support[t] += row_sum<T>(U, [=](int64_t j) { return p[j] != 0 ? T(1) : T(0); });
            for (int64_t j = 0; j < U; ++j) block[j] += p[j];
            if ((i - first + 1) % BLOCK == 0) sum.flush();
        }
        sum.flush();
    });
}

// Y += P^T X: the entries of P that are not 0, each with a part of a row of X that stays in cache.
// P (h, U), X (h, K), Y (U, K). A thread has columns of Y to itself.
template <typename T>
void add_product(const T* plan, const T* values, T* total, int64_t h, int64_t U, int64_t K,
                 int64_t threads) {
    const int64_t chunks = (K + CHUNK - 1) / CHUNK;
    in_parallel(chunks, std::min(threads, chunks), [=](int64_t, int64_t from, int64_t to) {
        std::vector<int32_t> columns(U);
        for (int64_t first = from * CHUNK; first < std::min(to * CHUNK, K); first += CHUNK) {
            const int64_t width = std::min(CHUNK, K - first);
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
        }
    });
}

// G = X Y'^T where P is not 0, and 0 elsewhere; Y' (U, K) is dloss/dY, G (h, U).
template <typename T>
void product_grad(const T* plan, const T* values, const T* grad, T* out, int64_t h, int64_t U,
                  int64_t K, int64_t threads) {
    in_parallel(h, std::min(threads, h), [=](int64_t, int64_t from, int64_t to) {
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

extern "C" {

void s2t2_search(const REAL* cost, int64_t V, int64_t U, REAL* shift, REAL* taus,
                 const REAL* sigmas, int64_t k, const double* mu, double* row_counts,
                 const REAL* col_guess, double* sums, int64_t threads) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(k, [=](auto K) {
        if constexpr (K < MOST)
            search<K>(solve, taus, shift, mu, row_counts, col_guess, sums, threads);
    });
}

void s2t2_column_sums(const REAL* cost, int64_t V, int64_t U, int64_t row_length,
                      const REAL* shift, const REAL* taus, const REAL* sigmas,
                      const int32_t* columns, int64_t k, const REAL* threshold, double* sums,
                      int64_t threads) {
    const Solve<REAL> solve{cost, V, U, row_length, shift, taus, sigmas, columns};
    with_constant(k, [=](auto K) {
        if constexpr (K < MOST)
            columns ? column_sums<K, true>(solve, threshold, sums, threads)
                    : column_sums<K, false>(solve, threshold, sums, threads);
    });
}

void s2t2_plan(const REAL* cost, int64_t V, int64_t U, const REAL* shift, const REAL* taus,
               const REAL* sigmas, int64_t n, int64_t first_row, int64_t rows, REAL* out,
               int64_t threads) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(n, [=](auto N) {
        if constexpr (N > 0) plan<N>(solve, first_row, rows, out, threads);
    });
}

void s2t2_backward(const REAL* cost, int64_t V, int64_t U, const REAL* shift, const REAL* taus,
                   const REAL* sigmas, int64_t n, int64_t known, REAL* grad,
                   const REAL* col_means, REAL* row_means, const double* row_counts,
                   uint8_t* masks, double* sums, int64_t threads) {
    const Solve<REAL> solve{cost, V, U, U, shift, taus, sigmas, nullptr};
    with_constant(n, [=](auto N) {
        with_constant(known, [=](auto KNOWN) {
            if constexpr (N > 0 && KNOWN <= N)
                backward<N, KNOWN>(solve, grad, col_means, row_means, row_counts, masks, sums,
                                   threads);
        });
    });
}

void s2t2_dual_rows(const REAL* cost, int64_t V, int64_t U, const REAL* shift, REAL* potentials,
                    const REAL* col, const double* mu, REAL* errors, REAL* tops, double* sums,
                    int64_t threads) {
    dual_rows(cost, V, U, shift, potentials, col, mu, errors, tops, sums, threads);
}

void s2t2_dual_columns(const REAL* cost, int64_t V, int64_t U, int64_t row_length,
                       const REAL* shift, const REAL* row, const REAL* col,
                       const int32_t* columns, double* sums, int64_t threads) {
    const Solve<REAL> solve{cost, V, U, row_length, shift, row, nullptr, columns};
    columns ? dual_columns<true>(solve, col, sums, threads)
            : dual_columns<false>(solve, col, sums, threads);
}

void s2t2_plan_sums(const REAL* plan, int64_t V, int64_t U, double* row_sums, double* col_sums,
                    double* support, int64_t threads) {
    plan_sums(plan, V, U, row_sums, col_sums, support, threads);
}

void s2t2_add_product(const REAL* plan, const REAL* values, REAL* total, int64_t h, int64_t U,
                      int64_t K, int64_t threads) {
    add_product(plan, values, total, h, U, K, threads);
}

void s2t2_product_grad(const REAL* plan, const REAL* values, const REAL* grad, REAL* out,
                       int64_t h, int64_t U, int64_t K, int64_t threads) {
    product_grad(plan, values, grad, out, h, U, K, threads);
}

}  // extern "C"
