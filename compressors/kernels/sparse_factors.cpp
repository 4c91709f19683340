// Adds sparse low-rank deltas to the output of a linear layer, in place (see factors.h for the form of a delta):
// every part of a fused linear and every delta of the step, in one call.
//
// The call is cut into tasks: at most FEW rows of one delta on one part and a range of its columns, or a run of blocks of LANES rows
// of one delta on all parts. How columns are cut depends on the factor alone, so a row's sums do not depend on the batch it is in.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "factors.h"

namespace {

constexpr int64_t ENTRIES_OF_A_PART = 1 << 16;  // of one factor, in one task: about 40 microseconds
constexpr int64_t MAX_PARTS = 8;
constexpr int64_t ALONE = 1 << 16;  // entry-rows (about 25 microseconds) below which a call is not worth a second thread

// OpenMP's entry point, in whichever runtime torch has loaded: a second runtime would bring a second team of threads.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
Team team = nullptr;

class Scratch {  // grows, never shrinks; one for each thread and use
public:
    float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }
    void* bytes(size_t count) {
        if (count > size_) {
            size_ = (count + 63) / 64 * 64;
            memory_.reset(std::aligned_alloc(64, size_));
            if (!memory_) std::abort();
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};

int parts_of(const dw_factor& f) {
    const int64_t parts = std::clamp<int64_t>(f.entries / ENTRIES_OF_A_PART, 1, MAX_PARTS);
    return static_cast<int>(std::min<int64_t>(parts, f.rank));
}

struct Unit {  // one factor for a few rows, in `parts` tasks whose sums the last one adds up
    const dw_factor* factor;
    const int64_t* rows;
    int num_rows, parts;
    size_t acc_at;  // floats into the shared scratch; parts > 1 only
    size_t open;    // index of its counter of open tasks
};

struct Task {
    int64_t unit;  // < 0: many rows
    int part;
    const dw_group* group;  // many rows only, as what follows
    size_t first_factor, num_factors;  // of Call::many
    int64_t first_row, last_row;
};

struct Call {
    const Level* level;
    Matrices io;
    std::vector<Unit> units;
    std::vector<Task> tasks;
    std::vector<const dw_factor*> many;  // the factors of many-row tasks
    std::unique_ptr<std::atomic<int>[]> open;
    size_t num_open;
    float* shared;
    std::atomic<int64_t> next;
};

void run_few(Call& call, const Unit& unit, int part) {
    static thread_local Scratch x_scratch, acc_scratch;
    const dw_factor& f = *unit.factor;
    const size_t acc_size = unit.num_rows * padded(f.out_features);
    float* x = x_scratch.floats((unit.num_rows + FEW) * padded(f.in_features) + FEW * padded(f.out_features));
    float* acc = unit.parts == 1 ? acc_scratch.floats(acc_size) : call.shared + unit.acc_at + part * acc_size;
    const int64_t rank = f.rank;
    const int first = static_cast<int>(rank * part / unit.parts), last = static_cast<int>(rank * (part + 1) / unit.parts);
    call.level->few(f, call.io, unit.rows, unit.num_rows, first, last, x, acc);
    if (unit.parts == 1) call.level->add(f, call.io, unit.rows, unit.num_rows, acc, 1);
    else if (call.open[unit.open].fetch_sub(1) == 1)
        call.level->add(f, call.io, unit.rows, unit.num_rows, call.shared + unit.acc_at, unit.parts);
}

void run_many(Call& call, const Task& task) {
    static thread_local Scratch x_scratch, acc_scratch, entry_scratch;
    static thread_local std::vector<const void*> decoded;
    const dw_factor* const* factors = call.many.data() + task.first_factor;
    size_t x_size = 0, acc_size = 0, entry_bytes = 0;
    for (size_t p = 0; p < task.num_factors; ++p) {
        x_size = std::max(x_size, static_cast<size_t>(LANES) * factors[p]->in_features);
        acc_size = std::max(acc_size, static_cast<size_t>(LANES) * factors[p]->out_features);
        entry_bytes += 8 * static_cast<size_t>(factors[p]->entries);
    }
    char* entries = static_cast<char*>(entry_scratch.bytes(entry_bytes));
    decoded.clear();
    for (size_t p = 0; p < task.num_factors; ++p) {
        decode(*factors[p], entries);
        decoded.push_back(entries);
        entries += 8 * factors[p]->entries;
    }
    float *x = x_scratch.floats(x_size), *acc = acc_scratch.floats(acc_size);
    for (int64_t row = task.first_row; row < task.last_row; row += LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, task.last_row - row));
        call.level->many(factors, task.num_factors, decoded.data(), call.io, task.group->rows + row, count, x, acc);
    }
}

void work(void* data) {
    Call& call = *static_cast<Call*>(data);
    for (;;) {
        const int64_t i = call.next.fetch_add(1);
        if (i >= static_cast<int64_t>(call.tasks.size())) return;
        const Task& task = call.tasks[i];
        if (task.unit >= 0) run_few(call, call.units[task.unit], task.part);
        else run_many(call, task);
    }
}

// The tasks of one factor for few rows.
void cut_few(Call& call, const dw_factor& f, const dw_group& group, size_t& acc_at) {
    const int parts = parts_of(f);
    for (int64_t row = 0; row < group.num_rows; row += FEW) {
        const int count = static_cast<int>(std::min<int64_t>(FEW, group.num_rows - row));
        for (int part = 0; part < parts; ++part) call.tasks.push_back({static_cast<int64_t>(call.units.size()), part, nullptr, 0, 0, 0, 0});
        call.units.push_back({&f, group.rows + row, count, parts, acc_at, call.num_open});
        if (parts > 1) {
            acc_at += parts * count * padded(f.out_features);
            ++call.num_open;
        }
    }
}

// Cuts a call into tasks; returns the entry-rows that they are worth.
int64_t cut(Call& call, const dw_group* groups, int64_t num_groups, int64_t threads) {
    int64_t worth = 0;
    size_t acc_at = 0;
    for (const dw_group* group = groups; group != groups + num_groups; ++group) {
        const size_t first = call.many.size();
        for (int64_t p = 0; p < group->num_factors; ++p) {
            const dw_factor& f = group->factors[p];
            worth += f.entries * group->num_rows;
            if (group->num_rows <= f.few_rows) cut_few(call, f, *group, acc_at);
            else call.many.push_back(&f);
        }
        const size_t count = call.many.size() - first;
        const int64_t blocks = (group->num_rows + LANES - 1) / LANES, runs = count ? std::min(blocks, threads) : 0;
        for (int64_t r = 0; r < runs; ++r) {
            const int64_t last = std::min(group->num_rows, blocks * (r + 1) / runs * LANES);
            call.tasks.push_back({-1, 0, group, first, count, blocks * r / runs * LANES, last});
        }
    }
    if (call.num_open) {
        static thread_local Scratch shared;
        call.shared = shared.floats(acc_at);
        call.open = std::make_unique<std::atomic<int>[]>(call.num_open);
        for (const Unit& unit : call.units)
            if (unit.parts > 1) call.open[unit.open] = unit.parts;
    }
    return worth;
}

const Level* level_of(int32_t level) {
#if defined(DW_X86)
    if (level == 2) return &avx512_level;
    if (level == 1) return &avx2_level;
#endif
    return &portable_level;
}

}  // namespace

extern "C" {

// The best level of this CPU: 2 AVX-512 (F, BW, VL, DQ), 1 AVX2 with FMA, 0 any.
DW_API int32_t dw_best_level() {
#if defined(DW_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt")) return 1;
#endif
    return 0;
}

// GOMP_parallel of the OpenMP runtime to share, or null to stay on the calling thread.
DW_API void dw_share_team(void* gomp_parallel) { team = reinterpret_cast<Team>(gomp_parallel); }

// x [*, in], y [*, out_total]; strides in elements; bf16 != 0 for bfloat16, else float32.
DW_API void dw_apply(const dw_group* groups, int64_t num_groups, const void* x, int64_t x_stride, void* y, int64_t y_stride, int32_t bf16,
              int32_t num_threads, int32_t level) {
    static thread_local Call call;  // its vectors keep their memory from call to call
    call.level = level_of(level);
    call.io = {x, y, x_stride, y_stride, bf16};
    call.units.clear();
    call.tasks.clear();
    call.many.clear();
    call.num_open = 0;
    call.next = 0;
    const int64_t threads = team ? std::max(num_threads, 1) : 1;
    const int64_t worth = cut(call, groups, num_groups, threads);
    // Always the whole team: a runtime ends the threads that a smaller one leaves out, and makes them anew for torch's next call.
    if (threads > 1 && call.tasks.size() > 1 && worth > ALONE) team(work, &call, static_cast<unsigned>(threads), 0);
    else work(&call);
}

// One side (0: v, 1: u) of a factor as a matrix, out [rank][positions, padded to PAD]; bf16 != 0: bfloat16, else fp32.
DW_API void dw_dense(const dw_factor* f, int32_t side, void* out, int32_t bf16, int32_t level) {
    const size_t stride = padded(side ? f->out_features : f->in_features);
    level_of(level)->dense(side ? f->u : f->v, f->kind, f->rank, stride, out, bf16);
}

}  // extern "C"
