// What the processor can do at most: multiply-adds that need no memory, and memory that needs no arithmetic. Nothing of the
// engine calls these; whoever measures does.
#pragma once

namespace cocoop_fast {
namespace {

// `rounds` times kPeakChains multiply-adds of a register in each thread. Each chain waits for itself alone: twelve chains are
// more than two units with a latency of four or five cycles need, and with their factors they fit sixteen registers.
void multiply_add_loop(const PeakLoop& a) {
#pragma omp parallel for schedule(static, 1) num_threads(a.threads)
    for (int64_t t = 0; t < a.threads; t++) {
        Vec acc[kPeakChains];
        for (int c = 0; c < kPeakChains; c++) acc[c] = broadcast(1.0f + (float)c);
        const Vec factor = broadcast(a.factor), term = broadcast(a.term);
        for (int64_t r = 0; r < a.rounds; r++) {
#pragma GCC unroll 12
            for (int c = 0; c < kPeakChains; c++) acc[c] = acc[c] * factor + term;
        }
        float total = 0;
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
