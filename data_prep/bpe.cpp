// Byte pair encoding of whole texts (without a pre-tokenizer), for bpe.py. It takes the same steps
// as `Word::merge_all` in Hugging Face tokenizers and so gives the same tokens: among all
// neighbouring pairs that have a merge, it joins those of the lowest rank first, from left to right.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr int32_t NONE = -1;

struct Merge {
    uint64_t pair;  // left id << 32 | right id
    int32_t rank;   // NONE marks an empty slot of the table
    uint32_t joined;
};

struct Symbol {
    uint32_t id;
    int32_t previous, next;
    bool gone;
};

// The merges of a tokenizer: a hash table with open addressing, at most half full.
class Rules {
public:
    Rules(const uint32_t* merges_M3, int64_t M, const int32_t* id_of_byte) {
        std::copy(id_of_byte, id_of_byte + 256, id_of_byte_);
        while (int64_t{1} << bits_ < 2 * M) ++bits_;
        table_.assign(size_t{1} << bits_, Merge{0, NONE, 0});
        for (int64_t m = 0; m < M; ++m) {
            const uint32_t* merge = merges_M3 + 3 * m;
            joined_.push_back(merge[2]);
            uint64_t pair = uint64_t{merge[0]} << 32 | merge[1];
            *slot(pair) = Merge{pair, static_cast<int32_t>(m), merge[2]};
        }
    }

    // Writes the token ids of one text. Returns their number, or -1 if a byte has no id.
    template <typename T>
    int64_t encode(const uint8_t* text, int64_t size, T* out) {
        symbols_.clear();
        for (int64_t i = 0; i < size; ++i) {
            int32_t id = id_of_byte_[text[i]];
            if (id < 0) return -1;
            int32_t at = static_cast<int32_t>(i);
            symbols_.push_back({static_cast<uint32_t>(id), at - 1, at + 1, false});
        }
        if (size) symbols_[size - 1].next = NONE;
        first_.clear();
        for (int32_t at = 0; at + 1 < size; ++at) add(at, first_);
        sort_first();
        size_t taken = 0;
        while (taken < first_.size() || !later_.empty()) {
            bool is_first =
                later_.empty() || (taken < first_.size() && first_[taken] < later_.front());
            uint64_t entry = is_first ? first_[taken++] : later_.front();
            if (!is_first) {
                std::pop_heap(later_.begin(), later_.end(), std::greater<>());
                later_.pop_back();
            }
            join(static_cast<int32_t>(entry & 0xffffffff), joined_[entry >> 32]);
        }
        int64_t count = 0;
        for (const Symbol& symbol : symbols_)
            if (!symbol.gone) out[count++] = static_cast<T>(symbol.id);
        return count;
    }

private:
    // Joins a symbol with the next one, unless an earlier merge has changed the pair.
    void join(int32_t at, uint32_t joined) {
        Symbol& left = symbols_[at];
        if (left.gone || left.next == NONE) return;
        Symbol& right = symbols_[left.next];
        const Merge* merge = slot(uint64_t{left.id} << 32 | right.id);
        if (merge->rank == NONE || merge->joined != joined) return;
        left.id = joined;
        left.next = right.next;
        right.gone = true;
        if (left.next != NONE) symbols_[left.next].previous = at;
        if (left.previous != NONE && add(left.previous, later_))
            std::push_heap(later_.begin(), later_.end(), std::greater<>());
        if (left.next != NONE && add(at, later_))
            std::push_heap(later_.begin(), later_.end(), std::greater<>());
    }

    // Queues a symbol and the next one if the pair has a merge. Entries compare by rank, then
    // position.
    bool add(int32_t at, std::vector<uint64_t>& queue) {
        const Symbol& left = symbols_[at];
        const Merge* merge = slot(uint64_t{left.id} << 32 | symbols_[left.next].id);
        if (merge->rank == NONE) return false;
        queue.push_back(static_cast<uint64_t>(merge->rank) << 32 | static_cast<uint32_t>(at));
        return true;
    }

    // Radix sort by rank, one byte per pass. It is stable, and positions ascend already.
    void sort_first() {
        scratch_.resize(first_.size());
        for (int shift = 32; joined_.size() >> (shift - 32); shift += 8) {
            size_t ends[257] = {};
            for (uint64_t entry : first_) ++ends[(entry >> shift & 255) + 1];
            for (int byte = 0; byte < 256; ++byte) ends[byte + 1] += ends[byte];
            for (uint64_t entry : first_) scratch_[ends[entry >> shift & 255]++] = entry;
            first_.swap(scratch_);
        }
    }

    // The slot of a pair: it holds the pair's merge, or is empty.
    Merge* slot(uint64_t pair) {
        size_t at = (pair * 0x9E3779B97F4A7C15u) >> (64 - bits_);
        while (table_[at].rank != NONE && table_[at].pair != pair) at = (at + 1) & (table_.size() - 1);
        return &table_[at];
    }

    int32_t id_of_byte_[256];
    int bits_ = 1;
    std::vector<Merge> table_;
    std::vector<uint32_t> joined_;  // by rank
    std::vector<Symbol> symbols_;
    // Queued pairs as rank << 32 | position. `first_` holds those of the text itself, sorted;
    // `later_` is a heap of those that joins have created.
    std::vector<uint64_t> first_, scratch_, later_;
};

template <typename T>
int64_t encode(
    Rules* rules, const uint8_t* text, const int64_t* sizes_D, int64_t D, int64_t end_id,
    T* out, int64_t* lengths_D) {
    int64_t total = 0;
    for (int64_t d = 0; d < D; text += sizes_D[d++]) {
        int64_t count = rules->encode(text, sizes_D[d], out + total);
        if (count < 0) return -1;
        lengths_D[d] = count + 1;
        out[total + count] = static_cast<T>(end_id);
        total += count + 1;
    }
    return total;
}

}  // namespace

extern "C" {

Rules* bpe_rules(const uint32_t* merges_M3, int64_t M, const int32_t* id_of_byte) {
    return new Rules(merges_M3, M, id_of_byte);
}

int64_t bpe_encode_uint16(
    Rules* rules, const uint8_t* text, const int64_t* sizes_D, int64_t D, int64_t end_id,
    uint16_t* out, int64_t* lengths_D) {
    return encode(rules, text, sizes_D, D, end_id, out, lengths_D);
}

int64_t bpe_encode_uint32(
    Rules* rules, const uint8_t* text, const int64_t* sizes_D, int64_t D, int64_t end_id,
    uint32_t* out, int64_t* lengths_D) {
    return encode(rules, text, sizes_D, D, end_id, out, lengths_D);
}

}
