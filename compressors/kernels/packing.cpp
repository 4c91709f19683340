// Builds and reads back the form of a delta in memory (see factors.h), and draws the seeded masks. Runs at load, not in a step,
// but for `decode`.

#include <algorithm>
#include <cstring>
#include <vector>

#include "factors.h"

namespace {

struct Pair {
    float value;
    uint32_t row;
};

float upper_half(uint32_t word) {
    const uint32_t bits = word & 0xFFFF0000u;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
float value_of(uint32_t word) { return upper_half(word); }
float value_of(const Pair& pair) { return pair.value; }
uint32_t row_of(uint32_t word) { return word & 0xFFFFu; }
uint32_t row_of(const Pair& pair) { return pair.row; }

void put(uint32_t* out, int8_t value, uint32_t row) {
    const float number = value;
    uint32_t bits;
    std::memcpy(&bits, &number, 4);  // the low half of a small integer's bits is zero
    *out = bits | row;
}
void put(uint32_t* out, uint16_t value, uint32_t row) { *out = static_cast<uint32_t>(value) << 16 | row; }
void put(Pair* out, int8_t value, uint32_t row) { *out = {static_cast<float>(value), row}; }
void put(Pair* out, uint16_t value, uint32_t row) { *out = {upper_half(static_cast<uint32_t>(value) << 16), row}; }
void put(Pair* out, float value, uint32_t row) { *out = {value, row}; }

void set(int8_t* out, float value) { *out = static_cast<int8_t>(value); }
void set(float* out, float value) { *out = value; }
void set(uint16_t* out, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *out = static_cast<uint16_t>(bits >> 16);
}

template <typename Entry, typename Value>
void pack(const Entry* entries, const int64_t* start, int64_t num_columns, const dw_column* columns, Value* values, uint8_t* index) {
    for (int64_t k = 0; k < num_columns; ++k) {
        const dw_column& c = columns[k];
        Value* to = values + c.values_at;
        uint8_t* bits = index + c.index_at;
        for (int64_t i = start[k]; i < start[k + 1]; ++i) {
            const uint32_t row = row_of(entries[i]);
            set(c.form == DW_DENSE ? to + row : to++, value_of(entries[i]));
            if (c.form == DW_MASK) bits[row >> 3] |= static_cast<uint8_t>(1u << (row & 7));
            else if (c.form == DW_INDEX16) reinterpret_cast<uint16_t*>(bits)[i - start[k]] = static_cast<uint16_t>(row);
            else if (c.form == DW_INDEX32) reinterpret_cast<uint32_t*>(bits)[i - start[k]] = row;
        }
    }
}

template <typename Entry>
void pack_as(const Entry* entries, const int64_t* start, int64_t num_columns, int32_t kind, const dw_column* columns, void* values,
             uint8_t* index) {
    if (kind == DW_INT8) pack(entries, start, num_columns, columns, static_cast<int8_t*>(values), index);
    else if (kind == DW_BF16) pack(entries, start, num_columns, columns, static_cast<uint16_t*>(values), index);
    else pack(entries, start, num_columns, columns, static_cast<float*>(values), index);
}

template <typename Entry, typename Value>
Entry* decode_side(const dw_side& side, int32_t rank, int32_t positions, Entry* out) {
    for (int32_t k = 0; k < rank; ++k) {
        const dw_column& c = side.columns[k];
        const Value* values = static_cast<const Value*>(side.values) + c.values_at;
        const uint8_t* index = side.index + c.index_at;
        if (c.form == DW_DENSE) {
            for (int32_t i = 0; i < positions; ++i) put(out++, values[i], static_cast<uint32_t>(i));
        } else if (c.form == DW_MASK) {
            for (int32_t base = 0; base < positions; base += 64) {
                uint64_t bits = 0;
                std::memcpy(&bits, index + base / 8, std::min<size_t>(8, (padded(positions) - base) / 8));
                for (; bits; bits &= bits - 1) put(out++, *values++, static_cast<uint32_t>(base + __builtin_ctzll(bits)));
            }
        } else {
            for (int32_t i = 0; i < c.count; ++i) {
                const uint32_t row = c.form == DW_INDEX16 ? reinterpret_cast<const uint16_t*>(index)[i]
                                                          : reinterpret_cast<const uint32_t*>(index)[i];
                put(out++, values[i], row);
            }
        }
    }
    return out;
}

template <typename Entry, typename Value>
void decode_as(const dw_factor& f, void* entries) {
    Entry* out = decode_side<Entry, Value>(f.v, f.rank, f.in_features, static_cast<Entry*>(entries));
    if (!f.identity_u) decode_side<Entry, Value>(f.u, f.rank, f.out_features, out);
}

// The finaliser of SplitMix64.
uint64_t mix(uint64_t z) {
    z ^= z >> 30;
    z *= 0xBF58476D1CE4E5B9ull;
    z ^= z >> 27;
    z *= 0x94D049BB133111EBull;
    z ^= z >> 31;
    return z;
}

// The hash of rank `keep` (from 1) among uniform ones: a histogram of the leading bits leaves a handful to order.
uint64_t bound_of(const uint64_t* hashes, int64_t count, int64_t keep, std::vector<uint64_t>& bucket) {
    constexpr int BITS = 9;
    uint32_t histogram[1 << BITS] = {};
    for (int64_t j = 0; j < count; ++j) ++histogram[hashes[j] >> (64 - BITS)];
    int64_t below = 0;
    uint64_t leading = 0;
    while (below + histogram[leading] < keep) below += histogram[leading++];
    bucket.clear();
    for (int64_t j = 0; j < count; ++j)
        if (hashes[j] >> (64 - BITS) == leading) bucket.push_back(hashes[j]);
    std::nth_element(bucket.begin(), bucket.begin() + (keep - below - 1), bucket.end());
    return bucket[keep - below - 1];
}

}  // namespace

bool packs_in_words(const dw_factor& f) { return f.kind != DW_FP32 && f.in_features <= 65536 && f.out_features <= 65536; }

void decode(const dw_factor& f, void* entries) {
    const bool words = packs_in_words(f);
    if (f.kind == DW_INT8) words ? decode_as<uint32_t, int8_t>(f, entries) : decode_as<Pair, int8_t>(f, entries);
    else if (f.kind == DW_BF16) words ? decode_as<uint32_t, uint16_t>(f, entries) : decode_as<Pair, uint16_t>(f, entries);
    else decode_as<Pair, float>(f, entries);
}

extern "C" {

// Whether int8 holds every value of the entries; words != 0: u32 words (bf16 value high, row low), else {float, u32}.
DW_API int32_t dw_all_int8(const void* entries, int32_t words, int64_t count) {
    const auto fits = [](float value) { return value >= -128 && value <= 127 && value == static_cast<float>(static_cast<int>(value)); };
    for (int64_t i = 0; i < count; ++i)
        if (!fits(words ? value_of(static_cast<const uint32_t*>(entries)[i]) : static_cast<const Pair*>(entries)[i].value)) return 0;
    return 1;
}

// One side: entries [start[num_columns]] into values and index, both zeroed, at the places that `columns` name.
DW_API void dw_pack(const void* entries, int32_t words, const int64_t* start, int64_t num_columns, int32_t kind, const dw_column* columns,
             void* values, uint8_t* index) {
    if (words) pack_as(static_cast<const uint32_t*>(entries), start, num_columns, kind, columns, values, index);
    else pack_as(static_cast<const Pair*>(entries), start, num_columns, kind, columns, values, index);
}

// The seeded masks of one factor (see compressors/masks.py for the definition): for every column the `keep` rows with the
// smallest (hash, row), ascending. keys [num_columns], keep [num_columns]; rows_out holds sum(keep) row numbers.
DW_API void dw_kept_rows(const uint64_t* keys, const int32_t* keep, int64_t num_columns, int64_t num_rows, int32_t* rows_out) {
    std::vector<uint64_t> hashes(static_cast<size_t>(num_rows)), bucket;
    for (int64_t k = 0; k < num_columns; ++k) {
        if (keep[k] == num_rows) {
            for (int64_t j = 0; j < num_rows; ++j) rows_out[j] = static_cast<int32_t>(j);
        } else if (keep[k] > 0) {
            for (int64_t j = 0; j < num_rows; ++j) hashes[j] = mix(keys[k] + static_cast<uint64_t>(j + 1) * 0x9E3779B97F4A7C15ull);
            const uint64_t bound = bound_of(hashes.data(), num_rows, keep[k], bucket);
            int64_t below = 0;
            for (int64_t j = 0; j < num_rows; ++j) below += hashes[j] < bound;
            int64_t ties = keep[k] - below, taken = 0;  // equal hashes at the bound: the smaller row wins
            for (int64_t j = 0; j < num_rows && taken < keep[k]; ++j)
                if (hashes[j] < bound || (hashes[j] == bound && ties-- > 0)) rows_out[taken++] = static_cast<int32_t>(j);
        }
        rows_out += keep[k];
    }
}

}  // extern "C"
