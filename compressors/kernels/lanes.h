// Many rows: decoded entries are walked, with the rows transposed ([feature][lane]), so that an entry costs the same for one row as
// for sixteen.

#ifndef DELTAWORKS_LANES_H
#define DELTAWORKS_LANES_H

#include "factors.h"
#include "isa.h"

namespace {

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

}  // namespace

#endif
