// The arithmetic of the kernel, compiled once for each instruction level (-DDW_AVX512, -DDW_AVX2 or neither; see build.py).
//
// Few rows (at most FEW) walk the packed columns as they lie in memory; the sums of a row are the same whatever rows go with it.
// Many rows walk decoded entries, with the rows transposed ([feature][lane]), so that an entry costs the same for 1 row as for 16.

#include "factors.h"
#include "isa.h"

namespace {

// Chunk i of a column, W positions; MASK columns are walked in order.
template <bool DENSE, typename Value>
DW_INLINE Isa::V chunk(const Value*& values, const uint8_t* index, int i) {
    if constexpr (DENSE) return Isa::dense(values + static_cast<size_t>(i) * Isa::W);
    else return Isa::expand(values, Isa::mask(index, i));
}

template <int T, bool DENSE, typename Value>
DW_INLINE void dot_chunks(const Value* values, const uint8_t* index, int chunks, size_t stride, const float* x, float* z) {
    using V = Isa::V;
    V even[T], odd[T];
    for (int t = 0; t < T; ++t) even[t] = odd[t] = Isa::zero();
    int i = 0;
    for (; i + 2 <= chunks; i += 2, x += 2 * Isa::W) {
        const V a = chunk<DENSE>(values, index, i), b = chunk<DENSE>(values, index, i + 1);
        for (int t = 0; t < T; ++t) {
            even[t] = Isa::fma(a, Isa::load(x + t * stride), even[t]);
            odd[t] = Isa::fma(b, Isa::load(x + t * stride + Isa::W), odd[t]);
        }
    }
    if (i < chunks) {
        const V a = chunk<DENSE>(values, index, i);
        for (int t = 0; t < T; ++t) even[t] = Isa::fma(a, Isa::load(x + t * stride), even[t]);
    }
    for (int t = 0; t < T; ++t) z[t] = Isa::sum(Isa::add(even[t], odd[t]));
}

template <int T, typename Value, typename Index>
DW_INLINE void dot_index(const Value* values, const Index* at, int32_t count, size_t stride, const float* x, float* z) {
    float sum[T][4] = {};
    int32_t i = 0;
    for (; i + Isa::W <= count; i += Isa::W) {
        float block[Isa::W];
        Isa::store(block, Isa::dense(values + i));
        for (int j = 0; j < Isa::W; ++j)
            for (int t = 0; t < T; ++t) sum[t][j % 4] += block[j] * x[t * stride + at[i + j]];
    }
    for (; i < count; ++i)
        for (int t = 0; t < T; ++t) sum[t][0] += number(values[i]) * x[t * stride + at[i]];
    for (int t = 0; t < T; ++t) z[t] = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
}

// z[t] = x[t] . column, for T rows.
template <int T, typename Value>
DW_INLINE void dot(const dw_column& c, const dw_side& side, int chunks, size_t stride, const float* x, float* z) {
    const Value* values = static_cast<const Value*>(side.values) + c.values_at;
    const uint8_t* index = side.index + c.index_at;
    if (c.form == DW_MASK) dot_chunks<T, false>(values, index, chunks, stride, x, z);
    else if (c.form == DW_DENSE) dot_chunks<T, true>(values, index, chunks, stride, x, z);
    else if (c.form == DW_INDEX16) dot_index<T>(values, reinterpret_cast<const uint16_t*>(index), c.count, stride, x, z);
    else dot_index<T>(values, reinterpret_cast<const uint32_t*>(index), c.count, stride, x, z);
}

template <int T, bool DENSE, typename Value>
DW_INLINE void spread_chunks(const Value* values, const uint8_t* index, int chunks, size_t stride, const float* z, float* acc) {
    using V = Isa::V;
    V scale[T];
    for (int t = 0; t < T; ++t) scale[t] = Isa::set(z[t]);
    for (int i = 0; i < chunks; ++i, acc += Isa::W) {
        const V a = chunk<DENSE>(values, index, i);
        for (int t = 0; t < T; ++t) Isa::store(acc + t * stride, Isa::fma(a, scale[t], Isa::load(acc + t * stride)));
    }
}

template <int T, typename Value, typename Index>
DW_INLINE void spread_index(const Value* values, const Index* at, int32_t count, size_t stride, const float* z, float* acc) {
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

// acc[t] += z[t] * column, for T rows.
template <int T, typename Value>
DW_INLINE void spread(const dw_column& c, const dw_side& side, int chunks, size_t stride, const float* z, float* acc) {
    const Value* values = static_cast<const Value*>(side.values) + c.values_at;
    const uint8_t* index = side.index + c.index_at;
    if (c.form == DW_MASK) spread_chunks<T, false>(values, index, chunks, stride, z, acc);
    else if (c.form == DW_DENSE) spread_chunks<T, true>(values, index, chunks, stride, z, acc);
    else if (c.form == DW_INDEX16) spread_index<T>(values, reinterpret_cast<const uint16_t*>(index), c.count, stride, z, acc);
    else spread_index<T>(values, reinterpret_cast<const uint32_t*>(index), c.count, stride, z, acc);
}

template <int T, typename Value>
void columns(const dw_factor& f, int first, int last, const float* x, float* acc) {
    const size_t x_stride = padded(f.in_features), acc_stride = padded(f.out_features);
    const int in_chunks = static_cast<int>(x_stride / Isa::W), out_chunks = static_cast<int>(acc_stride / Isa::W);
    for (int k = first; k < last; ++k) {
        float z[T];
        dot<T, Value>(f.v.columns[k], f.v, in_chunks, x_stride, x, z);
        if (f.identity_u) {
            for (int t = 0; t < T; ++t) acc[t * acc_stride + k] = z[t];
            continue;
        }
        for (int t = 0; t < T; ++t) z[t] *= f.coef[k];
        spread<T, Value>(f.u.columns[k], f.u, out_chunks, acc_stride, z, acc);
    }
}

template <typename Value>
void columns_of(const dw_factor& f, int num_rows, int first, int last, const float* x, float* acc) {
    if (num_rows == FEW) return columns<FEW, Value>(f, first, last, x, acc);
    if (num_rows >= 2) columns<2, Value>(f, first, last, x, acc);
    if (num_rows == 2) return;
    const size_t done = num_rows - 1;
    columns<1, Value>(f, first, last, x + done * padded(f.in_features), acc + done * padded(f.out_features));
}
static_assert(FEW == 4, "columns_of serves 1 to 4 rows");

template <typename Scalar>
void read_rows(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, float* x) {
    const size_t stride = padded(f.in_features);
    for (int t = 0; t < num_rows; ++t) {
        const Scalar* row = static_cast<const Scalar*>(io.x) + rows[t] * io.x_stride;
        float* out = x + t * stride;
        for (int32_t i = 0; i < f.in_features; ++i) out[i] = number(row[i]);
        for (size_t i = f.in_features; i < stride; ++i) out[i] = 0;
        if (f.identity_u)
            for (int32_t i = 0; i < f.in_features; ++i) out[i] *= f.coef[i];
    }
}

void few(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, int first, int last, float* x, float* acc) {
    if (io.bf16) read_rows<Bf16>(f, io, rows, num_rows, x);
    else read_rows<float>(f, io, rows, num_rows, x);
    std::memset(acc, 0, sizeof(float) * num_rows * padded(f.out_features));
    if (f.kind == DW_INT8) columns_of<int8_t>(f, num_rows, first, last, x, acc);
    else if (f.kind == DW_BF16) columns_of<Bf16>(f, num_rows, first, last, x, acc);
    else columns_of<float>(f, num_rows, first, last, x, acc);
}

template <typename Scalar>
void add_rows(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, const float* acc, int parts) {
    const size_t stride = padded(f.out_features);
    for (int t = 0; t < num_rows; ++t) {
        Scalar* row = static_cast<Scalar*>(io.y) + rows[t] * io.y_stride + f.out_offset;
        const float* from = acc + t * stride;
        if (parts == 1) {
            for (int32_t i = 0; i < f.out_features; ++i) assign(row + i, number(row[i]) + from[i]);
            continue;
        }
        for (int32_t i = 0; i < f.out_features; ++i) {
            float sum = from[i];
            for (int p = 1; p < parts; ++p) sum += from[i + static_cast<size_t>(p) * num_rows * stride];
            assign(row + i, number(row[i]) + sum);
        }
    }
}

void add(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, const float* acc, int parts) {
    if (io.bf16) add_rows<Bf16>(f, io, rows, num_rows, acc, parts);
    else add_rows<float>(f, io, rows, num_rows, acc, parts);
}

// Decoded entries.

struct Packed {
    uint32_t word;
    uint32_t row() const { return word & 0xFFFFu; }
    float value() const {
        const uint32_t bits = word & 0xFFFF0000u;
        float result;
        std::memcpy(&result, &bits, 4);
        return result;
    }
};

struct Wide {
    float number;
    uint32_t index;
    uint32_t row() const { return index; }
    float value() const { return number; }
};

// L registers of lanes: x and acc are [feature][L * W].
template <int L, typename Entry>
void lanes(const dw_factor& f, const Entry* v, const Entry* u, const float* x, float* acc) {
    using V = Isa::V;
    constexpr size_t WIDTH = static_cast<size_t>(L) * Isa::W;
    for (int32_t k = 0; k < f.rank; ++k) {
        V even[L], odd[L];
        for (int l = 0; l < L; ++l) even[l] = odd[l] = Isa::zero();
        int32_t left = f.v.columns[k].count;
        for (; left >= 2; left -= 2, v += 2) {
            const V a = Isa::set(v[0].value()), b = Isa::set(v[1].value());
            const float *first = x + v[0].row() * WIDTH, *second = x + v[1].row() * WIDTH;
            for (int l = 0; l < L; ++l) even[l] = Isa::fma(a, Isa::load(first + l * Isa::W), even[l]);
            for (int l = 0; l < L; ++l) odd[l] = Isa::fma(b, Isa::load(second + l * Isa::W), odd[l]);
        }
        if (left) {
            const V a = Isa::set(v->value());
            for (int l = 0; l < L; ++l) even[l] = Isa::fma(a, Isa::load(x + v->row() * WIDTH + l * Isa::W), even[l]);
            ++v;
        }
        V z[L];
        for (int l = 0; l < L; ++l) z[l] = Isa::add(even[l], odd[l]);
        if (f.identity_u) {
            for (int l = 0; l < L; ++l) Isa::store(acc + k * WIDTH + l * Isa::W, z[l]);
            continue;
        }
        for (int l = 0; l < L; ++l) z[l] = Isa::mul(z[l], Isa::set(f.coef[k]));
        for (int32_t i = 0; i < f.u.columns[k].count; ++i, ++u) {
            const V a = Isa::set(u->value());
            float* at = acc + u->row() * WIDTH;
            for (int l = 0; l < L; ++l) Isa::store(at + l * Isa::W, Isa::fma(a, z[l], Isa::load(at + l * Isa::W)));
        }
    }
}

// x [feature][width] = the rows, transposed; lanes without a row are zeros.
template <typename Scalar>
void gather_lanes(const Matrices& io, const int64_t* rows, int num_rows, int32_t features, int width, float* x) {
    const Scalar* from[LANES];
    for (int t = 0; t < num_rows; ++t) from[t] = static_cast<const Scalar*>(io.x) + rows[t] * io.x_stride;
    if (num_rows < width) std::memset(x, 0, sizeof(float) * width * features);
    int first = 0;
#if defined(DW_AVX512) || defined(DW_AVX2)
    for (; first + 8 <= num_rows; first += 8) {
        int32_t i = 0;
        for (; i + 8 <= features; i += 8) {
            __m256 block[8];
            for (int t = 0; t < 8; ++t) block[t] = eight(from[first + t] + i);
            transpose8(block);
            for (int j = 0; j < 8; ++j) _mm256_storeu_ps(x + static_cast<size_t>(i + j) * width + first, block[j]);
        }
        for (; i < features; ++i)
            for (int t = first; t < first + 8; ++t) x[static_cast<size_t>(i) * width + t] = number(from[t][i]);
    }
#endif
    for (int32_t i = 0; i < features; ++i)
        for (int t = first; t < num_rows; ++t) x[static_cast<size_t>(i) * width + t] = number(from[t][i]);
}

// y[rows] += acc [feature][width], transposed.
template <typename Scalar>
void scatter_lanes(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, int width, const float* acc) {
    Scalar* to[LANES];
    for (int t = 0; t < num_rows; ++t) to[t] = static_cast<Scalar*>(io.y) + rows[t] * io.y_stride + f.out_offset;
    int first = 0;
#if defined(DW_AVX512) || defined(DW_AVX2)
    for (; first + 8 <= num_rows; first += 8) {
        int32_t i = 0;
        for (; i + 8 <= f.out_features; i += 8) {
            __m256 block[8];
            for (int j = 0; j < 8; ++j) block[j] = _mm256_loadu_ps(acc + static_cast<size_t>(i + j) * width + first);
            transpose8(block);
            for (int t = 0; t < 8; ++t) put_eight(to[first + t] + i, _mm256_add_ps(eight(to[first + t] + i), block[t]));
        }
        for (; i < f.out_features; ++i)
            for (int t = first; t < first + 8; ++t)
                assign(to[t] + i, number(to[t][i]) + acc[static_cast<size_t>(i) * width + t]);
    }
#endif
    for (int t = first; t < num_rows; ++t)
        for (int32_t i = 0; i < f.out_features; ++i)
            assign(to[t] + i, number(to[t][i]) + acc[static_cast<size_t>(i) * width + t]);
}

template <int L, typename Scalar>
void many_typed(const dw_factor* const* factors, int64_t num_factors, const void* const* decoded, const Matrices& io,
                const int64_t* rows, int num_rows, float* x, float* acc) {
    constexpr int width = L * Isa::W;
    int32_t read = -1;
    for (int64_t p = 0; p < num_factors; ++p) {
        const dw_factor& f = *factors[p];
        if (f.in_features != read || f.identity_u) {  // parts of a linear share x, but for the scale of an identity's
            gather_lanes<Scalar>(io, rows, num_rows, f.in_features, width, x);
            read = f.identity_u ? -1 : f.in_features;
        }
        if (f.identity_u)
            for (int32_t i = 0; i < f.in_features; ++i)
                for (int l = 0; l < width; ++l) x[static_cast<size_t>(i) * width + l] *= f.coef[i];
        std::memset(acc, 0, sizeof(float) * width * f.out_features);
        int64_t v_count = 0;
        for (int32_t k = 0; k < f.rank; ++k) v_count += f.v.columns[k].count;
        if (packs_in_words(f)) {
            const Packed* v = static_cast<const Packed*>(decoded[p]);
            lanes<L, Packed>(f, v, v + v_count, x, acc);
        } else {
            const Wide* v = static_cast<const Wide*>(decoded[p]);
            lanes<L, Wide>(f, v, v + v_count, x, acc);
        }
        scatter_lanes<Scalar>(f, io, rows, num_rows, width, acc);
    }
}

void many(const dw_factor* const* factors, int64_t num_factors, const void* const* decoded, const Matrices& io, const int64_t* rows,
          int num_rows, float* x, float* acc) {
    constexpr int FULL = LANES / Isa::W;
    if (num_rows <= Isa::W) {
        if (io.bf16) many_typed<1, Bf16>(factors, num_factors, decoded, io, rows, num_rows, x, acc);
        else many_typed<1, float>(factors, num_factors, decoded, io, rows, num_rows, x, acc);
    } else {
        if (io.bf16) many_typed<FULL, Bf16>(factors, num_factors, decoded, io, rows, num_rows, x, acc);
        else many_typed<FULL, float>(factors, num_factors, decoded, io, rows, num_rows, x, acc);
    }
}

}  // namespace

#if defined(DW_AVX512)
extern const Level avx512_level = {few, add, many};
#elif defined(DW_AVX2)
extern const Level avx2_level = {few, add, many};
#else
extern const Level portable_level = {few, add, many};
#endif
