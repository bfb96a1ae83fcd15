// The passes of dykstra.py for a CPU: one sweep over this rank's rows each, a row at a time, so
// that its iterates stay in cache. The same numbers as the passes in passes.py up to the order of
// sums. Names and shapes are theirs: V rows, U columns, n iterations, row-major matrices.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int64_t BLOCK = 32;      // rows whose column sums are added up in T before in double
constexpr int64_t PER_WORD = 15;    // iterations whose supports one integer holds
constexpr int64_t ROW_BLOCK = 512;  // entries whose row sum is added up in T before in double

template <typename T>
T relu(T x) {
    return x > 0 ? x : 0;
}

template <typename T>
T least(T x, T y) {
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

// What a solve has found so far, and the matrix. columns: null, or which columns to look at
// (then sigmas hold those alone, and U is their number).
template <typename T>
struct Solve {
    const T* cost;
    int64_t V, U, row_length;
    const T *shift, *taus, *sigmas;
    const int64_t* columns;

    // Z_0 of a row.
    void begin(int64_t i, T* z) const {
        const T* c = cost + i * row_length;
        if (columns)
            for (int64_t j = 0; j < U; ++j) z[j] = c[columns[j]] - shift[i];
        else
            for (int64_t j = 0; j < U; ++j) z[j] = c[j] - shift[i];
    }

    // W_k from Z_k and W_{k-1}, in place.
    void next_w(int64_t i, int64_t k, const T* __restrict z, T* __restrict w) const {
        const T tau = taus[k * V + i];
        if (k == 0) {
            for (int64_t j = 0; j < U; ++j) w[j] = relu(z[j] - tau);
            return;
        }
        const T* __restrict sigma = sigmas + (k - 1) * U;
        for (int64_t j = 0; j < U; ++j) w[j] = relu(z[j] - tau) + least(w[j], sigma[j]);
    }

    // Z_{k+1} and W_k from Z_k and W_{k-1}, in place.
    void next(int64_t i, int64_t k, T* __restrict z, T* __restrict w) const {
        const T tau = taus[k * V + i];
        const T* __restrict sigma = sigmas + k * U;
        const T* __restrict last = k ? sigma - U : sigma;  // W_{-1} is 0, and so is least(0, 0)
        const T keep = k ? T(1) : T(0);
        for (int64_t j = 0; j < U; ++j) {
            w[j] = relu(z[j] - tau) + least(w[j], keep * last[j]);
            z[j] = relu(w[j] - sigma[j]) + least(z[j], tau);
        }
    }

    // Z_k and W_{k-1}.
    void iterate(int64_t i, int64_t k, T* z, T* w) const {
        begin(i, z);
        std::fill(w, w + U, T(0));
        for (int64_t q = 0; q < k; ++q) next(i, q, z, w);
    }

    // The supports of a row: in `on`, an integer per entry for every PER_WORD iterations, bit 2 q
    // says Z_q > tau_q and bit 2 q + 1 says W_q > sigma_q. z and w are scratch.
    void supports(int64_t i, int64_t n, T* __restrict z, T* __restrict w, int32_t* on) const {
        begin(i, z);
        std::fill(w, w + U, T(0));
        for (int64_t k = 0; k < n; ++k) {
            int32_t* __restrict word = on + k / PER_WORD * U;
            const int32_t row = 1 << 2 * (k % PER_WORD), col = 2 * row;
            const T tau = taus[k * V + i];
            const T* __restrict sigma = sigmas + k * U;
            if (k % PER_WORD == 0) std::fill(word, word + U, 0);
            for (int64_t j = 0; j < U; ++j) word[j] |= z[j] > tau ? row : 0;
            next(i, k, z, w);
            for (int64_t j = 0; j < U; ++j) word[j] |= w[j] > sigma[j] ? col : 0;
        }
    }
};

// Column sums of many rows: in T over a block, in double over the blocks.
template <typename T>
struct ColumnSums {
    std::vector<T> block;
    double* total;
    int64_t rows = 0;

    ColumnSums(int64_t U, double* total) : block(U), total(total) {}
    void end_row() {
        if (++rows == BLOCK) flush();
    }
    void flush() {
        for (size_t j = 0; j < block.size(); ++j) total[j] += block[j], block[j] = 0;
        rows = 0;
    }
};

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

template <typename T>
double row_sum(const T* z, int64_t U) {
    double total = 0;
    for (int64_t first = 0; first < U; first += ROW_BLOCK) {
        const int64_t last = std::min(U, first + ROW_BLOCK);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < last; ++j) sum += z[j];
        total += sum;
    }
    return total;
}

// The threshold at which a row's excess is mu, by Newton's method: see newton_threshold.
template <typename T>
T search_row(const T* z, int64_t U, double mu, T guess, double& count) {
    const T top = largest(z, U);
    const T ceiling = std::nextafter(top, -std::numeric_limits<T>::infinity());
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

// A row of W in the counts and excesses of the columns above their thresholds.
template <typename T>
void add_columns(const T* __restrict w, const T* __restrict threshold, int64_t U,
                 T* __restrict count, T* __restrict excess) {
    for (int64_t j = 0; j < U; ++j) {
        const T over = w[j] - threshold[j];
        count[j] += over > 0 ? T(1) : T(0);
        excess[j] += relu(over);
    }
}

// tau_k of every row (from the guesses that taus holds), and the columns' first step.
// shift is made for k = 0. sums (threads, 3, U): count, excess and sum; zeroed by the caller.
template <typename T>
void search(Solve<T> solve, int64_t k, T* taus, T* shift, const double* mu, double* row_counts,
            const T* col_guess, double* sums, int64_t threads) {
    const int64_t V = solve.V, U = solve.U;
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> z(U), w(U);
        ColumnSums<T> count(U, sums + 3 * t * U), excess(U, sums + (3 * t + 1) * U),
            total(U, sums + (3 * t + 2) * U);
        for (int64_t i = first; i < last; ++i) {
            if (k == 0) shift[i] = largest(solve.cost + i * U, U);
            solve.iterate(i, k, z.data(), w.data());
            taus[k * V + i] = search_row(z.data(), U, mu[i], taus[k * V + i], row_counts[i]);
            solve.next_w(i, k, z.data(), w.data());
            add_columns(w.data(), col_guess, U, count.block.data(), excess.block.data());
            T* __restrict block = total.block.data();
            for (int64_t j = 0; j < U; ++j) block[j] += w[j];
            count.end_row(), excess.end_row(), total.end_row();
        }
        count.flush(), excess.flush(), total.flush();
    });
}

// Counts and excesses of W_k's columns above their thresholds: sums (threads, 2, U).
template <typename T>
void column_sums(Solve<T> solve, int64_t k, const T* threshold, double* sums, int64_t threads) {
    const int64_t U = solve.U;
    in_parallel(solve.V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> z(U), w(U);
        ColumnSums<T> count(U, sums + 2 * t * U), excess(U, sums + (2 * t + 1) * U);
        for (int64_t i = first; i < last; ++i) {
            solve.iterate(i, k, z.data(), w.data());
            solve.next_w(i, k, z.data(), w.data());
            add_columns(w.data(), threshold, U, count.block.data(), excess.block.data());
            count.end_row(), excess.end_row();
        }
        count.flush(), excess.flush();
    });
}

// Rows first..last of the plan.
template <typename T>
void plan(Solve<T> solve, int64_t n, int64_t first_row, int64_t rows, T* out, int64_t threads) {
    const int64_t U = solve.U;
    const T* sigma = solve.sigmas + (n - 1) * U;
    in_parallel(rows, threads, [=](int64_t, int64_t first, int64_t last) {
        std::vector<T> z(U), w(U);
        for (int64_t i = first; i < last; ++i) {
            solve.iterate(first_row + i, n - 1, z.data(), w.data());
            solve.next_w(first_row + i, n - 1, z.data(), w.data());
            for (int64_t j = 0; j < U; ++j) out[i * U + j] = relu(w[j] - sigma[j]);
        }
    });
}

// One row's gX (which is gP too after the first step) and gQ.
template <typename T>
struct RowGrad {
    int64_t U;
    T *__restrict g, *__restrict gq, *__restrict y;

    // Undo iteration k, the first of all where keep is 0. The row's mean is given or made here.
    void undo(const int32_t* __restrict on, int64_t k, const T* __restrict col_mean, T keep,
              bool make_mean, double row_count, T& row_mean) const {
        const int32_t row = 1 << 2 * (k % PER_WORD), col = 2 * row;
        if (make_mean) {
            for (int64_t j = 0; j < U; ++j) {
                const T q = gq[j] + (on[j] & col ? g[j] - gq[j] - col_mean[j] : T(0));
                y[j] = on[j] & row ? q - keep * g[j] : T(0);
            }
            row_mean = T(row_sum(y, U) / row_count);
        }
        const T mean = row_mean;
        for (int64_t j = 0; j < U; ++j) {
            gq[j] += on[j] & col ? g[j] - gq[j] - col_mean[j] : T(0);
            g[j] = (on[j] & row ? gq[j] - keep * g[j] - mean : T(0)) + keep * g[j];
        }
    }
};

// See _back_pass in passes.py. known: iterations whose column means are known. row_means (n, V) in
// the order in which they are made; the last known one is made here. sums (threads, U).
// masks: null, or a byte per entry with its supports, made where nothing is known yet.
template <typename T>
void backward(Solve<T> solve, int64_t n, int64_t known, T* grad, const T* col_means, T* row_means,
              const double* row_counts, uint8_t* masks, double* sums, int64_t threads) {
    const int64_t V = solve.V, U = solve.U;
    in_parallel(V, threads, [=](int64_t t, int64_t first, int64_t last) {
        std::vector<T> z(U), w(U), q(U);
        std::vector<int32_t> words((n + PER_WORD - 1) / PER_WORD * U);
        ColumnSums<T> sum(U, sums + t * U);
        const RowGrad<T> row{U, w.data(), q.data(), z.data()};
        for (int64_t i = first; i < last; ++i) {
            int32_t* __restrict on = words.data();
            uint8_t* __restrict mask = masks ? masks + i * U : nullptr;
            if (mask && known) {
                for (int64_t j = 0; j < U; ++j) on[j] = mask[j];
            } else {
                solve.supports(i, n, z.data(), w.data(), on);
                if (mask)
                    for (int64_t j = 0; j < U; ++j) mask[j] = uint8_t(on[j]);
            }
            std::copy(grad + i * U, grad + (i + 1) * U, row.g);
            std::fill(q.begin(), q.end(), T(0));
            for (int64_t done = 0; done < known; ++done) {
                const int64_t k = n - 1 - done;
                row.undo(on + k / PER_WORD * U, k, col_means + done * U, done ? T(1) : T(0),
                         done + 1 == known, row_counts[k * V + i], row_means[done * V + i]);
            }
            if (known == n) {
                std::copy(row.g, row.g + U, grad + i * U);
                continue;
            }
            const int64_t k = n - 1 - known;
            const int32_t* __restrict word = on + k / PER_WORD * U;
            const int32_t col = 2 << 2 * (k % PER_WORD);
            T* __restrict block = sum.block.data();
            for (int64_t j = 0; j < U; ++j)
                block[j] += word[j] & col ? row.g[j] - row.gq[j] : T(0);
            sum.end_row();
        }
        sum.flush();
    });
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                          \
    extern "C" void search_##SUFFIX(const T* cost, int64_t V, int64_t U, T* shift, T* taus,        \
                                    const T* sigmas, int64_t k, const double* mu,                  \
                                    double* row_counts, const T* col_guess, double* sums,          \
                                    int64_t threads) {                                             \
        search<T>({cost, V, U, U, shift, taus, sigmas, nullptr}, k, taus, shift, mu, row_counts,   \
                  col_guess, sums, threads);                                                       \
    }                                                                                              \
    extern "C" void column_sums_##SUFFIX(                                                          \
        const T* cost, int64_t V, int64_t U, int64_t row_length, const T* shift, const T* taus,    \
        const T* sigmas, const int64_t* columns, int64_t k, const T* threshold, double* sums,      \
        int64_t threads) {                                                                         \
        column_sums<T>({cost, V, U, row_length, shift, taus, sigmas, columns}, k, threshold, sums, \
                       threads);                                                                   \
    }                                                                                              \
    extern "C" void plan_##SUFFIX(const T* cost, int64_t V, int64_t U, const T* shift,             \
                                  const T* taus, const T* sigmas, int64_t n, int64_t first_row,    \
                                  int64_t rows, T* out, int64_t threads) {                         \
        plan<T>({cost, V, U, U, shift, taus, sigmas, nullptr}, n, first_row, rows, out, threads);  \
    }                                                                                              \
    extern "C" void backward_##SUFFIX(const T* cost, int64_t V, int64_t U, const T* shift,         \
                                      const T* taus, const T* sigmas, int64_t n, int64_t known,    \
                                      T* grad, const T* col_means, T* row_means,                   \
                                      const double* row_counts, uint8_t* masks, double* sums,      \
                                      int64_t threads) {                                           \
        backward<T>({cost, V, U, U, shift, taus, sigmas, nullptr}, n, known, grad, col_means,      \
                    row_means, row_counts, masks, sums, threads);                                  \
    }

EXPORT(float, float32)
EXPORT(double, float64)
