// Few rows: the packed columns are walked as they lie in memory.

#ifndef DELTAWORKS_WALK_H
#define DELTAWORKS_WALK_H

#include "factors.h"
#include "isa.h"

namespace {

constexpr int GROUP = 128;  // columns whose products with x are kept until they are added
constexpr int BLOCK = 8;    // columns that are added, or multiplied with few rows, together
constexpr int STRIP = 512;  // positions whose sums are worked on at a time: eight rows of them lie in the first cache

// Chunk i of a column, W positions; MASK columns are walked in order.
template <bool DENSE, typename Value>
DW_INLINE Isa::V chunk(const Value*& values, const uint8_t* index, int i) {
    if constexpr (DENSE) return Isa::dense(values + static_cast<size_t>(i) * Isa::W);
    else return Isa::expand(values, Isa::mask(index, i));
}

// The columns of a group, by how they are walked.
struct Order {
    int mask[GROUP], dense[GROUP], index[GROUP];
    int masks = 0, denses = 0, indices = 0;
    Order(const dw_column* columns, int count) {
        for (int k = 0; k < count; ++k) {
            if (columns[k].form == DW_MASK) mask[masks++] = k;
            else if (columns[k].form == DW_DENSE) dense[denses++] = k;
            else index[indices++] = k;
        }
    }
};

// z[columns[b]][t] = x[t] . column, for B columns of one form and T rows. Each sum is one chain, whatever B and T.
template <int T, int B, bool DENSE, typename Value>
DW_INLINE void dot_block(const dw_column* c, const int* columns, const dw_side& side, int chunks, size_t stride, const float* x,
                         float (*z)[T]) {
    using V = Isa::V;
    const Value* values[B];
    const uint8_t* index[B];
    V sum[B][T];
    for (int b = 0; b < B; ++b) {
        values[b] = static_cast<const Value*>(side.values) + c[columns[b]].values_at;
        index[b] = side.index + c[columns[b]].index_at;
        for (int t = 0; t < T; ++t) sum[b][t] = Isa::zero();
    }
    for (int i = 0; i < chunks; ++i, x += Isa::W) {
        V a[B];
        for (int b = 0; b < B; ++b) a[b] = chunk<DENSE>(values[b], index[b], i);
        for (int t = 0; t < T; ++t) {
            const V row = Isa::load(x + t * stride);
            for (int b = 0; b < B; ++b) sum[b][t] = Isa::fma(a[b], row, sum[b][t]);
        }
    }
    for (int b = 0; b < B; ++b)
        for (int t = 0; t < T; ++t) z[columns[b]][t] = Isa::sum(sum[b][t]);
}

template <int T, bool DENSE, typename Value>
DW_APART void dot_chunks(const dw_column* c, const int* columns, int count, const dw_side& side, int chunks, size_t stride,
                          const float* x, float (*z)[T]) {
    constexpr int FIT = Isa::REGISTERS / 2 / T, B = FIT > BLOCK ? BLOCK : FIT < 1 ? 1 : FIT;  // half of the registers hold sums
    int i = 0;
    for (; i + B <= count; i += B) dot_block<T, B, DENSE, Value>(c, columns + i, side, chunks, stride, x, z);
    for (; i < count; ++i) dot_block<T, 1, DENSE, Value>(c, columns + i, side, chunks, stride, x, z);
}

// Indexed columns are walked with the rows transposed, [feature][lane], so that an entry costs about the same for 1 row as for 8.
#if defined(DW_AVX512) || defined(DW_AVX2)
struct One {
    static constexpr int N = 1;
    using V = float;
    DW_INLINE V set(float value) { return value; }
    DW_INLINE V fma(V a, V b, V c) { return __builtin_fmaf(a, b, c); }
};
struct Four {
    static constexpr int N = 4;
    using V = __m128;
    DW_INLINE V set(float value) { return _mm_set1_ps(value); }
    DW_INLINE V fma(V a, V b, V c) { return _mm_fmadd_ps(a, b, c); }
};
struct Eight {
    static constexpr int N = 8;
    using V = __m256;
    DW_INLINE V set(float value) { return _mm256_set1_ps(value); }
    DW_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};
#else
template <int LANES, typename Vector>
struct Plain {
    static constexpr int N = LANES;
    using V = Vector;
    DW_INLINE V set(float value) { return value - V{}; }
    DW_INLINE V fma(V a, V b, V c) { return a * b + c; }
};
using One = Plain<1, float>;
using Four = Plain<4, Isa::V>;
struct Eight {
    static constexpr int N = 8;
    struct V {
        Isa::V low, high;
        friend V operator+(V a, V b) { return {a.low + b.low, a.high + b.high}; }
    };
    DW_INLINE V set(float value) { return {Isa::set(value), Isa::set(value)}; }
    DW_INLINE V fma(V a, V b, V c) { return {a.low * b.low + c.low, a.high * b.high + c.high}; }
};
#endif
template <int T>
struct LanesOf {
    using L = Four;
};
template <>
struct LanesOf<1> {
    using L = One;
};
template <>
struct LanesOf<8> {
    using L = Eight;
};
template <int T>
using Lanes = typename LanesOf<T>::L;

template <typename V>
DW_INLINE V lanes_at(const float* p) {
    V result;
    std::memcpy(&result, p, sizeof(V));
    return result;
}

// z[t] = x[t] . column; x is [feature][lane].
template <int T, typename Value, typename Index>
DW_APART void dot_index(const Value* values, const Index* at, int32_t count, const float* x, float* z) {
    using L = Lanes<T>;
    using V = typename L::V;
    V sum[4] = {};
    int32_t i = 0;
    for (; i + Isa::W <= count; i += Isa::W) {
        float block[Isa::W];
        Isa::store(block, Isa::dense(values + i));
        for (int j = 0; j < Isa::W; ++j)
            sum[j % 4] = L::fma(L::set(block[j]), lanes_at<V>(x + static_cast<size_t>(at[i + j]) * L::N), sum[j % 4]);
    }
    for (; i < count; ++i) sum[0] = L::fma(L::set(number(values[i])), lanes_at<V>(x + static_cast<size_t>(at[i]) * L::N), sum[0]);
    const V whole = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    std::memcpy(z, &whole, sizeof(float) * T);
}

// acc[position][lane] += z[lane] * column.
template <int T, typename Value, typename Index>
DW_APART void spread_index(const Value* values, const Index* at, int32_t count, const float* z, float* acc) {
    using L = Lanes<T>;
    using V = typename L::V;
    constexpr int STEP = T == 1 ? Isa::W : 4;  // positions of one column differ, so no update waits for another
    V scale = {};
    std::memcpy(&scale, z, sizeof(float) * T);
    int32_t i = 0;
    for (; i + Isa::W <= count; i += Isa::W) {
        float block[Isa::W];
        Isa::store(block, Isa::dense(values + i));
        for (int first = 0; first < Isa::W; first += STEP) {
            V updated[STEP];
            for (int j = 0; j < STEP; ++j)
                updated[j] = L::fma(L::set(block[first + j]), scale, lanes_at<V>(acc + static_cast<size_t>(at[i + first + j]) * L::N));
            for (int j = 0; j < STEP; ++j)
                std::memcpy(acc + static_cast<size_t>(at[i + first + j]) * L::N, &updated[j], sizeof(V));
        }
    }
    for (; i < count; ++i) {
        float* sums = acc + static_cast<size_t>(at[i]) * L::N;
        const V sum = L::fma(L::set(number(values[i])), scale, lanes_at<V>(sums));
        std::memcpy(sums, &sum, sizeof(V));
    }
}

// [row][stride] to [feature][lane], the lanes beyond T zero.
template <int T>
void to_lanes(const float* rows, size_t stride, int32_t features, float* lanes) {
    constexpr int N = Lanes<T>::N;
    int32_t i = 0;
#if defined(DW_AVX512) || defined(DW_AVX2)
    if constexpr (T == 8)
        for (; i + 8 <= features; i += 8) {
            __m256 block[8];
            for (int t = 0; t < 8; ++t) block[t] = eight(rows + t * stride + i);
            transpose8(block);
            for (int j = 0; j < 8; ++j) put_eight(lanes + static_cast<size_t>(i + j) * N, block[j]);
        }
#endif
    for (; i < features; ++i) {
        for (int t = 0; t < T; ++t) lanes[static_cast<size_t>(i) * N + t] = rows[t * stride + i];
        for (int t = T; t < N; ++t) lanes[static_cast<size_t>(i) * N + t] = 0;
    }
}

// acc [row][stride] += lanes [feature][lane].
template <int T>
void add_lanes(const float* lanes, size_t stride, int32_t features, float* acc) {
    constexpr int N = Lanes<T>::N;
    int32_t i = 0;
#if defined(DW_AVX512) || defined(DW_AVX2)
    if constexpr (T == 8)
        for (; i + 8 <= features; i += 8) {
            __m256 block[8];
            for (int j = 0; j < 8; ++j) block[j] = eight(lanes + static_cast<size_t>(i + j) * N);
            transpose8(block);
            for (int t = 0; t < 8; ++t) {
                float* sums = acc + t * stride + i;
                put_eight(sums, _mm256_add_ps(eight(sums), block[t]));
            }
        }
#endif
    for (; i < features; ++i)
        for (int t = 0; t < T; ++t) acc[t * stride + i] += lanes[static_cast<size_t>(i) * N + t];
}

bool any_indexed(const dw_column* c, int count) {
    for (int k = 0; k < count; ++k)
        if (c[k].form != DW_MASK && c[k].form != DW_DENSE) return true;
    return false;
}

// z[k][t] = x[t] . column k, for the columns of a group and T rows; x_lanes is x as `to_lanes` gives it.
template <int T, typename Value>
DW_INLINE void dot(const dw_column* c, int count, const dw_side& side, int chunks, size_t stride, const float* x,
                   const float* x_lanes, float (*z)[T]) {
    const Order order(c, count);
    dot_chunks<T, false, Value>(c, order.mask, order.masks, side, chunks, stride, x, z);
    dot_chunks<T, true, Value>(c, order.dense, order.denses, side, chunks, stride, x, z);
    for (int i = 0; i < order.indices; ++i) {
        const int k = order.index[i];
        const Value* values = static_cast<const Value*>(side.values) + c[k].values_at;
        const uint8_t* index = side.index + c[k].index_at;
        if (c[k].form == DW_INDEX16) dot_index<T>(values, reinterpret_cast<const uint16_t*>(index), c[k].count, x_lanes, z[k]);
        else dot_index<T>(values, reinterpret_cast<const uint32_t*>(index), c[k].count, x_lanes, z[k]);
    }
}

// acc[t] += z[columns[b]][t] * column, chunks [first, last), for B columns of one form and T rows: a sum is read and written once for
// all of them, in their order. `values` are where the columns' values go on.
template <int T, int B, bool DENSE, typename Value>
DW_INLINE void spread_block(const dw_column* c, const int* columns, const dw_side& side, const Value** values, int first, int last,
                            size_t stride, const float (*z)[T], float* acc) {
    using V = Isa::V;
    const Value* at[B];
    const uint8_t* index[B];
    const float* scale[B];
    for (int b = 0; b < B; ++b) {
        scale[b] = z[columns[b]];
        at[b] = DENSE ? static_cast<const Value*>(side.values) + c[columns[b]].values_at : values[b];
        index[b] = side.index + c[columns[b]].index_at;
    }
    for (int i = first; i < last; ++i) {
        V a[B];
        for (int b = 0; b < B; ++b) a[b] = chunk<DENSE>(at[b], index[b], i);
        float* sums = acc + static_cast<size_t>(i) * Isa::W;
        for (int t = 0; t < T; ++t) {
            V sum = Isa::load(sums + t * stride);
            for (int b = 0; b < B; ++b) sum = Isa::fma(a[b], Isa::set(scale[b][t]), sum);
            Isa::store(sums + t * stride, sum);
        }
    }
    for (int b = 0; b < B; ++b) values[b] = at[b];
}

template <int T, bool DENSE, typename Value>
DW_APART void spread_chunks(const dw_column* c, const int* columns, int count, const dw_side& side, int chunks, size_t stride,
                             const float (*z)[T], float* acc) {
    const Value* values[GROUP];
    for (int i = 0; i < count; ++i) values[i] = static_cast<const Value*>(side.values) + c[columns[i]].values_at;
    constexpr int STEP = STRIP / Isa::W;
    for (int first = 0; first < chunks; first += STEP) {
        const int last = first + STEP < chunks ? first + STEP : chunks;
        int i = 0;
        for (; i + BLOCK <= count; i += BLOCK)
            spread_block<T, BLOCK, DENSE, Value>(c, columns + i, side, values + i, first, last, stride, z, acc);
        for (; i + BLOCK / 2 <= count; i += BLOCK / 2)
            spread_block<T, BLOCK / 2, DENSE, Value>(c, columns + i, side, values + i, first, last, stride, z, acc);
        for (; i < count; ++i) spread_block<T, 1, DENSE, Value>(c, columns + i, side, values + i, first, last, stride, z, acc);
    }
}

template <int T, typename Value, typename Index>
DW_APART void spread_index(const Value* values, const Index* at, int32_t count, size_t stride, const float* z, float* acc) {
    int32_t i = 0;
    for (; i + Isa::W <= count; i += Isa::W) {
        float block[Isa::W];
        Isa::store(block, Isa::dense(values + i));
        for (int t = 0; t < T; ++t) {
            float updated[Isa::W];  // positions of one column differ, so no update waits for another
            for (int j = 0; j < Isa::W; ++j) updated[j] = acc[t * stride + at[i + j]] + block[j] * z[t];
            for (int j = 0; j < Isa::W; ++j) acc[t * stride + at[i + j]] = updated[j];
        }
    }
    for (; i < count; ++i)
        for (int t = 0; t < T; ++t) acc[t * stride + at[i]] += number(values[i]) * z[t];
}

// acc[t] += z[k][t] * column k, for the columns of a group and T rows: masked columns first, then whole ones. The sums of indexed
// ones are kept apart, in acc_lanes.
template <int T, typename Value>
DW_INLINE void spread(const dw_column* c, int count, const dw_side& side, int chunks, size_t stride, const float (*z)[T], float* acc,
                      float* acc_lanes) {
    const Order order(c, count);
    spread_chunks<T, false, Value>(c, order.mask, order.masks, side, chunks, stride, z, acc);
    spread_chunks<T, true, Value>(c, order.dense, order.denses, side, chunks, stride, z, acc);
    for (int i = 0; i < order.indices; ++i) {
        const int k = order.index[i];
        const Value* values = static_cast<const Value*>(side.values) + c[k].values_at;
        const uint8_t* index = side.index + c[k].index_at;
        if (c[k].form == DW_INDEX16) spread_index<T>(values, reinterpret_cast<const uint16_t*>(index), c[k].count, z[k], acc_lanes);
        else spread_index<T>(values, reinterpret_cast<const uint32_t*>(index), c[k].count, z[k], acc_lanes);
    }
}

// acc [T][padded(out)] += the columns [first, last), x [T][padded(in)]; `lanes` is scratch for FEW rows of both.
template <int T, typename Value>
void columns(const dw_factor& f, int first, int last, const float* x, float* acc, float* lanes) {
    const size_t x_stride = padded(f.in_features), acc_stride = padded(f.out_features);
    const int in_chunks = static_cast<int>(x_stride / Isa::W), out_chunks = static_cast<int>(acc_stride / Isa::W);
    const bool indexed_u = !f.identity_u && any_indexed(f.u.columns + first, last - first);
    float *x_lanes = lanes, *acc_lanes = lanes + FEW * x_stride;
    if (any_indexed(f.v.columns + first, last - first)) to_lanes<T>(x, x_stride, f.in_features, x_lanes);
    if (indexed_u) std::memset(acc_lanes, 0, sizeof(float) * Lanes<T>::N * f.out_features);
    float z[GROUP][T];
    for (int group = first; group < last; group += GROUP) {
        const int count = last - group < GROUP ? last - group : GROUP;
        dot<T, Value>(f.v.columns + group, count, f.v, in_chunks, x_stride, x, x_lanes, z);
        if (f.identity_u) {
            for (int k = 0; k < count; ++k)
                for (int t = 0; t < T; ++t) acc[t * acc_stride + group + k] = z[k][t];
            continue;
        }
        for (int k = 0; k < count; ++k)
            for (int t = 0; t < T; ++t) z[k][t] *= f.coef[group + k];
        spread<T, Value>(f.u.columns + group, count, f.u, out_chunks, acc_stride, z, acc, acc_lanes);
    }
    if (indexed_u) add_lanes<T>(acc_lanes, acc_stride, f.out_features, acc);
}

template <typename Value>
void columns_of(const dw_factor& f, int num_rows, int first, int last, const float* x, float* acc, float* lanes) {
    if (num_rows == FEW) return columns<FEW, Value>(f, first, last, x, acc, lanes);
    const size_t x_stride = padded(f.in_features), acc_stride = padded(f.out_features);
    int done = 0;
    if (num_rows & 4) columns<4, Value>(f, first, last, x, acc, lanes), done = 4;
    if (num_rows & 2) columns<2, Value>(f, first, last, x + done * x_stride, acc + done * acc_stride, lanes), done += 2;
    if (num_rows & 1) columns<1, Value>(f, first, last, x + done * x_stride, acc + done * acc_stride, lanes);
}
static_assert(FEW == 8, "columns_of serves 1 to 8 rows");

// side as a matrix, out [rank][stride], its padding zero; the stride is a multiple of PAD.
template <typename Value, typename Number>
void dense_side(const dw_side& side, int rank, size_t stride, Number* out) {
    const int chunks = static_cast<int>(stride / Isa::W);
    for (int k = 0; k < rank; ++k, out += stride) {
        const dw_column& c = side.columns[k];
        const Value* values = static_cast<const Value*>(side.values) + c.values_at;
        const uint8_t* index = side.index + c.index_at;
        if (c.form == DW_DENSE) {
            for (int i = 0; i < chunks; ++i) put(out + static_cast<size_t>(i) * Isa::W, chunk<true>(values, index, i));
        } else if (c.form == DW_MASK) {
            for (int i = 0; i < chunks; ++i) put(out + static_cast<size_t>(i) * Isa::W, chunk<false>(values, index, i));
        } else {
            std::memset(out, 0, stride * sizeof(Number));
            for (int32_t i = 0; i < c.count; ++i) {
                const uint32_t at = c.form == DW_INDEX16 ? reinterpret_cast<const uint16_t*>(index)[i]
                                                         : reinterpret_cast<const uint32_t*>(index)[i];
                assign(out + at, number(values[i]));
            }
        }
    }
}

}  // namespace

#endif
