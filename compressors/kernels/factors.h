// What the files of the kernel share: the layout of a delta in memory, and the table of functions that each instruction level fills.
//
// A delta of one part of a linear is y[o] += sum_k coef[k] * (x . v[:, k]) * u[:, k]. Every column of v and of u has a form of its own:
//   DENSE    a value for each position, zeros included, padded to a multiple of PAD
//   MASK     one bit for each position (little endian, padded to PAD bits), and the values of the set bits
//   INDEX16  the position of each value as u16
//   INDEX32  the same as u32, for sides of more than 65536 positions
// Values are int8, bf16 or fp32, one kind for both sides of a factor. Arithmetic is in fp32.
//
// No torch header and no OpenMP directive is used: the library is built by any C++17 compiler and outlives torch upgrades.

#ifndef DELTAWORKS_FACTORS_H
#define DELTAWORKS_FACTORS_H

#include <cstddef>
#include <cstdint>

#define DW_API __attribute__((visibility("default")))

extern "C" {

enum dw_form : int32_t { DW_DENSE = 0, DW_MASK = 1, DW_INDEX16 = 2, DW_INDEX32 = 3 };
enum dw_kind : int32_t { DW_INT8 = 0, DW_BF16 = 1, DW_FP32 = 2 };

struct dw_column {           // one column of one side; mirrored by a numpy dtype in packing.py
    uint32_t values_at;      // first value, in values
    uint32_t index_at;       // first byte of its mask or indices
    int32_t count;           // values
    int32_t form;
};

struct dw_side {
    const void* values;      // readable 64 bytes past the last value
    const uint8_t* index;
    const dw_column* columns;  // [rank]
};

struct dw_factor {           // one delta on one part of a linear; mirrored by ctypes in native.py
    int32_t rank, out_features, in_features, out_offset;
    int32_t kind;
    int32_t few_rows;        // up to so many rows the packed columns are walked as they are; more of them decode the columns first
    int32_t identity_u;      // 1: u is the identity (rank == out_features, u is empty) and coef [in_features] scales x
    int32_t reserved;
    int64_t entries;         // values of both sides, the zeros of dense columns included
    const float* coef;       // [rank]
    dw_side v, u;
};

struct dw_group {            // the rows of the batch that use one delta
    const dw_factor* factors;  // one for each part that the delta touches
    int64_t num_factors;
    const int64_t* rows;     // row numbers in x and y
    int64_t num_rows;
};

}  // extern "C"

constexpr int PAD = 16;      // positions: a multiple of every level's vector
constexpr int FEW = 8;       // rows that one pass over packed columns serves
constexpr int LANES = 16;    // rows that one pass over decoded entries serves

constexpr size_t padded(size_t positions) { return (positions + PAD - 1) / PAD * PAD; }

struct Matrices {
    const void* x;
    void* y;
    int64_t x_stride, y_stride;  // elements
    int32_t bf16;                // 1: bfloat16, 0: float32
};

// What one instruction level provides. Scratch is 64-byte aligned.
struct Level {
    // Few rows: acc [num_rows][padded(out)] += the columns [first, last) of the factor; x is scratch for
    // (num_rows + FEW) * padded(in) + FEW * padded(out) floats.
    void (*few)(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, int first, int last, float* x, float* acc);
    // y[rows] += the sum of `parts` accumulators, each [num_rows][padded(out)], in their order.
    void (*add)(const dw_factor& f, const Matrices& io, const int64_t* rows, int num_rows, const float* acc, int parts);
    // Many rows: at most LANES of them against entries that `decode` wrote, for all factors of a group that take it (they share x).
    void (*many)(const dw_factor* const* factors, int64_t num_factors, const void* const* decoded, const Matrices& io,
                 const int64_t* rows, int num_rows, float* x, float* acc);
    // One side as a matrix, out [rank][stride], fp32 or bf16 (to nearest); stride = padded(positions).
    void (*dense)(const dw_side& side, int32_t kind, int rank, size_t stride, void* out, int32_t bf16);
};

// Entries of one factor, v then u, column after column: u32 words (bf16 value high, position low), or {float, u32} for
// kind DW_FP32 and sides beyond 65536 positions.
bool packs_in_words(const dw_factor& f);
void decode(const dw_factor& f, void* entries);

extern const Level portable_level, avx2_level, avx512_level;

#endif
