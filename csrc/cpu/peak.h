// What the processor can do at most: multiply-adds that need no memory, and memory that needs no arithmetic. Nothing of
// the engine calls these; whoever measures does.
#pragma once

namespace cocoop_fast {
namespace {

// Chains of multiply-adds, each of which waits for itself alone, and which fit the registers with their factors. Two
// units with a latency of four or five cycles need fewer than twelve; ARM's larger cores have four, which need sixteen.
constexpr int kPeakChains = 3 * kRegisters / 4;

// NEON's instruction overwrites what is added; adding to `acc` needs no copy.
inline Vec multiply_add(Vec acc, Vec factor, Vec term) {
#if defined(COCOOP_FAST_NEON)
    return (Vec)vfmaq_f32((float32x4_t)acc, (float32x4_t)factor, (float32x4_t)term);
#else
    return acc * factor + term;
#endif
}

// `rounds` times kPeakChains multiply-adds of a register in each thread.
void multiply_add_loop(const PeakLoop& a) {
#pragma omp parallel for schedule(static, 1) num_threads(a.threads)
    for (int64_t t = 0; t < a.threads; t++) {
        Vec acc[kPeakChains];
#pragma GCC unroll 24
        for (int c = 0; c < kPeakChains; c++) acc[c] = broadcast(1.0f + (float)c);
        const Vec factor = broadcast(a.factor), term = broadcast(a.term);
        for (int64_t r = 0; r < a.rounds; r++) {
#pragma GCC unroll 24
            for (int c = 0; c < kPeakChains; c++) acc[c] = multiply_add(acc[c], factor, term);
        }
        float total = 0;
#pragma GCC unroll 24
        for (int c = 0; c < kPeakChains; c++) total += sum_lanes(acc[c]);
        a.out[t] = total;
    }
}

// Each thread adds up its part of n floats.
void read_loop(const PeakLoop& a) {
#pragma omp parallel for schedule(static, 1) num_threads(a.threads)
    for (int64_t t = 0; t < a.threads; t++) {
        const int64_t begin = a.n * t / a.threads, end = a.n * (t + 1) / a.threads;
        const float* part = a.data + begin;
        a.out[t] = sum(end - begin, [=](int64_t i, auto lanes) { return lanes.load(part + i); });
    }
}

}  // namespace
}  // namespace cocoop_fast
