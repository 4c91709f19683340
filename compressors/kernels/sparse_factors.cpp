// Adds sparse low-rank deltas to the output of a linear layer, in place:
//
//     y[row, offset : offset + out] += sum_k coef[k] * (x[row, :] . v[:, k]) * u[:, k]
//
// for every part of a fused linear and every delta of the step, in one call. Only kept entries of u and v are stored, column after
// column. An entry is either one 32-bit word (bf16 value in the high half, 16-bit row in the low half) or a {float, uint32} pair.
//
// A task is one delta on one part for at most LANES rows of the batch. The rows of a task are held transposed ([feature][lane]),
// so that one pass over the entries serves all of them: an entry costs the same for 1 row as for LANES rows.
//
// No torch header is used: the library is built by the system's compiler in a second and outlives torch upgrades.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define DW_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DW_CLONES
#endif
#define DW_INLINE static inline __attribute__((always_inline))

extern "C" {

struct dw_factor {            // one delta on one part of a linear; mirrored by ctypes in native.py
    int32_t rank, out_features, in_features, out_offset;
    int32_t packed;           // 1: 32-bit words, 0: {float, uint32} pairs
    int32_t reserved;
    const float* coef;        // [rank]
    const int64_t* v_start;   // [rank + 1] offsets into v_entries
    const int64_t* u_start;   // [rank + 1]
    const void* v_entries;
    const void* u_entries;
};

struct dw_group {             // the rows of the batch that use one delta
    const dw_factor* factors; // one per part that the delta touches
    int64_t num_factors;
    const int64_t* rows;      // row numbers in x and y
    int64_t num_rows;
};

}  // extern "C"

namespace {

constexpr int LANES = 8;  // one AVX register of floats

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

struct Bf16 {
    uint16_t bits;
};

DW_INLINE float load(const float* p) { return *p; }
DW_INLINE float load(const Bf16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
DW_INLINE void store(float* p, float value) { *p = value; }
DW_INLINE void store(Bf16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
        p->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);  // keep a NaN a NaN
    } else {
        p->bits = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
}

// One row: four partial sums hide the latency of the dependent additions.
template <typename Entry>
DW_INLINE void apply_one(const dw_factor& f, const float* __restrict x, float* __restrict acc) {
    const Entry* v = static_cast<const Entry*>(f.v_entries);
    const Entry* u = static_cast<const Entry*>(f.u_entries);
    for (int32_t k = 0; k < f.rank; ++k) {
        float sum[4] = {0, 0, 0, 0};
        int64_t i = f.v_start[k];
        const int64_t v_end = f.v_start[k + 1];
        for (; i + 4 <= v_end; i += 4)
            for (int j = 0; j < 4; ++j) sum[j] += v[i + j].value() * x[v[i + j].row()];
        for (; i < v_end; ++i) sum[0] += v[i].value() * x[v[i].row()];
        const float z = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * f.coef[k];
        int64_t o = f.u_start[k];
        const int64_t u_end = f.u_start[k + 1];
        for (; o + 4 <= u_end; o += 4) {  // rows of one column differ, so the four updates are independent
            float updated[4];
            for (int j = 0; j < 4; ++j) updated[j] = acc[u[o + j].row()] + u[o + j].value() * z;
            for (int j = 0; j < 4; ++j) acc[u[o + j].row()] = updated[j];
        }
        for (; o < u_end; ++o) acc[u[o].row()] += u[o].value() * z;
    }
}

// W floats that the compiler keeps in the widest registers of the clone it compiles for.
template <int W>
using Lanes [[gnu::vector_size(W * sizeof(float)), gnu::aligned(4), gnu::may_alias]] = float;

// Up to W rows at once: x and acc are [feature][W].
template <typename Entry, int W>
DW_INLINE void apply_lanes(const dw_factor& f, const float* x, float* acc) {
    using Vec = Lanes<W>;
    const Entry* v = static_cast<const Entry*>(f.v_entries);
    const Entry* u = static_cast<const Entry*>(f.u_entries);
    const Vec* xs = reinterpret_cast<const Vec*>(x);
    Vec* ys = reinterpret_cast<Vec*>(acc);
    for (int32_t k = 0; k < f.rank; ++k) {
        Vec even = {}, odd = {};
        int64_t i = f.v_start[k];
        const int64_t v_end = f.v_start[k + 1];
        for (; i + 2 <= v_end; i += 2) {
            even += xs[v[i].row()] * v[i].value();
            odd += xs[v[i + 1].row()] * v[i + 1].value();
        }
        if (i < v_end) even += xs[v[i].row()] * v[i].value();
        const Vec z = (even + odd) * f.coef[k];
        for (int64_t o = f.u_start[k]; o < f.u_start[k + 1]; ++o) ys[u[o].row()] += z * u[o].value();
    }
}

struct Task {
    const dw_factor* factor;
    const int64_t* rows;
    int num_rows;
};

struct Matrices {
    const void* x;
    void* y;
    int64_t x_stride, y_stride;
};

template <typename Scalar, int W>
DW_INLINE void run_lanes(const Task& task, const Matrices& io, float* x, float* acc) {
    const dw_factor& f = *task.factor;
    const Scalar* source = static_cast<const Scalar*>(io.x);
    Scalar* target = static_cast<Scalar*>(io.y) + f.out_offset;
    if (W > task.num_rows) std::memset(x, 0, sizeof(float) * W * f.in_features);
    for (int t = 0; t < task.num_rows; ++t) {
        const Scalar* row = source + task.rows[t] * io.x_stride;
        for (int32_t i = 0; i < f.in_features; ++i) x[static_cast<size_t>(i) * W + t] = load(row + i);
    }
    std::memset(acc, 0, sizeof(float) * W * f.out_features);
    if constexpr (W == 1) {
        if (f.packed) apply_one<Packed>(f, x, acc); else apply_one<Wide>(f, x, acc);
    } else {
        if (f.packed) apply_lanes<Packed, W>(f, x, acc); else apply_lanes<Wide, W>(f, x, acc);
    }
    for (int t = 0; t < task.num_rows; ++t) {
        Scalar* row = target + task.rows[t] * io.y_stride;
        for (int32_t i = 0; i < f.out_features; ++i) store(row + i, load(row + i) + acc[static_cast<size_t>(i) * W + t]);
    }
}

template <typename Scalar>
DW_INLINE void run_typed(const Task& task, const Matrices& io, float* scratch) {
    float* x = scratch;
    float* acc = scratch + static_cast<size_t>(LANES) * task.factor->in_features;
    if (task.num_rows == 1) run_lanes<Scalar, 1>(task, io, x, acc);
    else if (task.num_rows <= 4) run_lanes<Scalar, 4>(task, io, x, acc);
    else run_lanes<Scalar, LANES>(task, io, x, acc);
}

DW_CLONES void run_float(const Task& task, const Matrices& io, float* scratch) { run_typed<float>(task, io, scratch); }
DW_CLONES void run_bf16(const Task& task, const Matrices& io, float* scratch) { run_typed<Bf16>(task, io, scratch); }

struct Ranked {
    uint64_t hash;
    int32_t row;
    bool operator<(const Ranked& other) const { return hash != other.hash ? hash < other.hash : row < other.row; }
};

uint64_t mix(uint64_t z) {
    z ^= z >> 30;
    z *= 0xBF58476D1CE4E5B9ull;
    z ^= z >> 27;
    z *= 0x94D049BB133111EBull;
    z ^= z >> 31;
    return z;
}

}  // namespace

extern "C" {

// x [*, in], y [*, out_total]; strides in elements; bf16 != 0 for bfloat16, else float32.
void dw_apply(const dw_group* groups, int64_t num_groups, const void* x, int64_t x_stride, void* y, int64_t y_stride, int32_t bf16,
              int32_t num_threads) {
    std::vector<Task> tasks;
    size_t scratch_floats = 0;
    for (int64_t g = 0; g < num_groups; ++g) {
        const dw_group& group = groups[g];
        for (int64_t p = 0; p < group.num_factors; ++p) {
            const dw_factor& f = group.factors[p];
            const size_t need = static_cast<size_t>(LANES) * (static_cast<size_t>(f.in_features) + f.out_features);
            if (need > scratch_floats) scratch_floats = need;
            for (int64_t first = 0; first < group.num_rows; first += LANES) {
                const int64_t left = group.num_rows - first;
                tasks.push_back({&f, group.rows + first, static_cast<int>(left < LANES ? left : LANES)});
            }
        }
    }
    const Matrices io = {x, y, x_stride, y_stride};
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_tasks > 1)
    {
        static thread_local std::vector<float> scratch;
        if (scratch.size() < scratch_floats) scratch.resize(scratch_floats);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; ++i) {
            if (bf16) run_bf16(tasks[i], io, scratch.data());
            else run_float(tasks[i], io, scratch.data());
        }
    }
}

// The seeded masks of one factor (see compressors/masks.py for the definition): for every column the `keep` rows with the
// smallest (hash, row), ascending. keys [num_columns], keep [num_columns]; rows_out holds sum(keep) row numbers.
void dw_kept_rows(const uint64_t* keys, const int32_t* keep, int64_t num_columns, int64_t num_rows, int32_t* rows_out) {
    std::vector<Ranked> ranked(static_cast<size_t>(num_rows));
    for (int64_t k = 0; k < num_columns; ++k) {
        if (keep[k] == num_rows) {
            for (int64_t j = 0; j < num_rows; ++j) rows_out[j] = static_cast<int32_t>(j);
        } else {
            for (int64_t j = 0; j < num_rows; ++j)
                ranked[j] = {mix(keys[k] + static_cast<uint64_t>(j + 1) * 0x9E3779B97F4A7C15ull), static_cast<int32_t>(j)};
            std::nth_element(ranked.begin(), ranked.begin() + keep[k] - 1, ranked.end());
            for (int32_t j = 0; j < keep[k]; ++j) rows_out[j] = ranked[j].row;
            std::sort(rows_out, rows_out + keep[k]);
        }
        rows_out += keep[k];
    }
}

}  // extern "C"
