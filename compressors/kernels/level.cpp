// The arithmetic of the kernel, compiled once for each instruction level (-DDW_AVX512, -DDW_AVX2 or neither; see build.py).
//
// Few rows (at most FEW) walk the packed columns as they lie in memory (walk.h); the sums of a row are the same whatever rows go
// with it. Many rows walk decoded entries, with the rows transposed (lanes.h).

#include "factors.h"
#include "isa.h"
#include "lanes.h"
#include "walk.h"

namespace {

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
    float* lanes = x + num_rows * padded(f.in_features);
    if (f.kind == DW_INT8) columns_of<int8_t>(f, num_rows, first, last, x, acc, lanes);
    else if (f.kind == DW_BF16) columns_of<Bf16>(f, num_rows, first, last, x, acc, lanes);
    else columns_of<float>(f, num_rows, first, last, x, acc, lanes);
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

template <typename Value>
void dense_as(const dw_side& side, int rank, size_t stride, void* out, int32_t bf16) {
    if (bf16) dense_side<Value>(side, rank, stride, static_cast<Bf16*>(out));
    else dense_side<Value>(side, rank, stride, static_cast<float*>(out));
}

void dense(const dw_side& side, int32_t kind, int rank, size_t stride, void* out, int32_t bf16) {
    if (kind == DW_INT8) dense_as<int8_t>(side, rank, stride, out, bf16);
    else if (kind == DW_BF16) dense_as<Bf16>(side, rank, stride, out, bf16);
    else dense_as<float>(side, rank, stride, out, bf16);
}

}  // namespace

#if defined(DW_AVX512)
extern const Level avx512_level = {few, add, many, dense};
#elif defined(DW_AVX2)
extern const Level avx2_level = {few, add, many, dense};
#else
extern const Level portable_level = {few, add, many, dense};
#endif
