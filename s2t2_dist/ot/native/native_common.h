// What the passes of native.cpp share: parts in parallel, sums over rows and columns, the search of
// a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

// A loop over entries is only vectorised where all that it calls is inlined.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t BLOCK = 32;       // rows whose column sums are added up in T before in double
constexpr int64_t AHEAD = 3;        // rows that are asked for before they are needed
constexpr int64_t ROW_BLOCK = 512;  // entries whose row sum is added up in T before in double

// Counts entries of type T; of the same width, so that both fit the same vectors.
template <typename T>
using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <typename T>
INLINE T least(T x, T y) {
    return x < y ? x : y;
}

// max(x - threshold, 0), to the last bit, of a finite x.
template <typename T>
INLINE T over(T x, T threshold) {
    return x - least(x, threshold);
}

// Calls work(part, first row, last row) on equal parts of V rows. Threads take the next part when
// they are done with one, because on a shared machine one thread may be slower than another.
template <typename Work>
void in_parallel(int64_t V, int64_t parts, Work work) {
#pragma omp parallel for schedule(dynamic, 1) if (parts > 1)
    for (int64_t t = 0; t < parts; ++t) work(t, V * t / parts, V * (t + 1) / parts);
}

// Asks the memory for entries that are needed soon (and may lie beyond the matrix, which is no
// fault): the processor's own look-ahead ends with a page, of which few rows fit into one.
template <typename T>
void look_ahead(const T* entries, int64_t count) {
    const char* bytes = reinterpret_cast<const char*>(entries);
    for (int64_t b = 0; b < count * int64_t(sizeof(T)); b += 64)
        __builtin_prefetch(bytes + b, 0, 2);
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

// Sum over j of term(j), which is called once for each j: in T over blocks and in double over those.
// In two chains, because an addition waits for the one before it.
template <typename T, typename Term>
double row_sum(int64_t U, Term term) {
    double total = 0;
    for (int64_t first = 0; first < U; first += ROW_BLOCK) {
        const int64_t last = std::min(U, first + ROW_BLOCK), half = (last - first) / 2;
        T sum = 0, other = 0;
#pragma omp simd reduction(+ : sum, other)
        for (int64_t j = first; j < first + half; ++j) sum += term(j), other += term(j + half);
        if (first + 2 * half < last) sum += term(last - 1);
        total += sum + other;
    }
    return total;
}

// Count and excess of the entries of a row above a threshold.
template <typename T>
void count_and_excess(const T* z, int64_t U, T threshold, double& count, double& excess) {
    count = excess = 0;
    for (int64_t first = 0; first < U; first += ROW_BLOCK) {
        const int64_t last = std::min(U, first + ROW_BLOCK), half = (last - first) / 2;
        Count<T> number = 0, numbers = 0;
        T sum = 0, sums = 0;
#pragma omp simd reduction(+ : number, numbers, sum, sums)
        for (int64_t j = first; j < first + half; ++j) {
            number += z[j] > threshold, numbers += z[j + half] > threshold;
            sum += over(z[j], threshold), sums += over(z[j + half], threshold);
        }
        if (first + 2 * half < last) {
            number += z[last - 1] > threshold;
            sum += over(z[last - 1], threshold);
        }
        count += number + numbers;
        excess += sum + sums;
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
// top: the row's largest entry.
template <typename T>
T search_row(const T* z, int64_t U, T top, double mu, T guess, double& count) {
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

}  // namespace
