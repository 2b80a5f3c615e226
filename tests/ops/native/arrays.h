// What the checks of the kernels share: arrays whose surroundings are watched, random numbers, and the comparison.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

constexpr double kEps = 1.0 / (1 << 23);
constexpr uint32_t kPoison = 0x7fc0dead;  // a NaN

// The same numbers with every C++ library: its distributions are not used.
class Random {
  public:
    explicit Random(uint32_t seed) : bits_(seed) {}
    int64_t below(int64_t n) { return (int64_t)(bits_() % (uint64_t)n); }
    int64_t from(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool coin() { return below(2) == 1; }
    float number() {  // of about unit size
        double sum = -6;
        for (int i = 0; i < 12; i++) sum += bits_() / 4294967296.0;
        return (float)sum;
    }
    template <class T>
    T one_of(std::initializer_list<T> values) {
        return values.begin()[below((int64_t)values.size())];
    }

  private:
    std::mt19937 bits_;
};

// groups x inner rows of d floats with poison before and between them; behind the last begins memory that nobody may
// touch.
class Array {
  public:
    Array(Random& random, int64_t groups, int64_t inner, int64_t d, bool dense = false)
        : n(groups * inner), d(d), inner_(inner) {
        inner_stride = d + (dense ? 0 : random.below(4));
        outer_stride = inner * inner_stride + (dense ? 0 : random.below(6));
        size_ = n == 0 ? 0 : (groups - 1) * outer_stride + (inner - 1) * inner_stride + d;
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        bytes_ = ((size_t)(kBefore + size_) * sizeof(float) + page - 1) / page * page;
        base_ = (char*)mmap(nullptr, bytes_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED || mprotect(base_ + bytes_, page, PROT_NONE) != 0) std::abort();
        bytes_ += page;
        data = (float*)(base_ + bytes_ - page) - size_;
        for (int64_t i = -kBefore; i < size_; i++) std::memcpy(data + i, &kPoison, sizeof(float));
    }
    Array(Random& random, int64_t n, int64_t d, bool dense = false) : Array(random, 1, n, d, dense) {}
    Array(const Array&) = delete;
    ~Array() { munmap(base_, bytes_); }

    float& at(int64_t r, int64_t i) { return data[r / inner_ * outer_stride + r % inner_ * inner_stride + i]; }
    Array& fill(Random& random, float scale = 1, float shift = 0) {
        for (int64_t r = 0; r < n; r++) {
            for (int64_t i = 0; i < d; i++) at(r, i) = scale * random.number() + shift;
        }
        return *this;
    }
    cocoop_fast::InRows in() const { return {data, inner_, outer_stride, inner_stride}; }
    cocoop_fast::OutRows out() { return {data, inner_, outer_stride, inner_stride}; }
    cocoop_fast::Part part(bool shared = false) const { return {data, shared ? 0 : outer_stride, inner_stride}; }
    cocoop_fast::OutPart out_part() { return {data, outer_stride, inner_stride}; }
    cocoop_fast::Matrix<float> matrix() { return {data, inner_stride}; }
    cocoop_fast::Matrix<const float> const_matrix() const { return {data, inner_stride}; }

    std::vector<uint32_t> bits() const {
        std::vector<uint32_t> all((size_t)(kBefore + size_));
        std::memcpy(all.data(), data - kBefore, all.size() * sizeof(float));
        return all;
    }
    void restore(const std::vector<uint32_t>& all) {
        std::memcpy(data - kBefore, all.data(), all.size() * sizeof(float));
    }
    // Whether the poison around the rows is still there.
    bool surroundings_are_whole() {
        const std::vector<uint32_t> now = bits();
        std::vector<bool> inside(now.size(), false);
        for (int64_t r = 0; r < n; r++) {
            for (int64_t i = 0; i < d; i++) inside[(size_t)(&at(r, i) - data + kBefore)] = true;
        }
        for (size_t i = 0; i < now.size(); i++) {
            if (!inside[i] && now[i] != kPoison) return false;
        }
        return true;
    }

    int64_t n, d, inner_stride, outer_stride;
    float* data;

  private:
    static constexpr int64_t kBefore = 32;
    int64_t inner_, size_;
    size_t bytes_;
    char* base_;
};

// Counts what is compared under one instruction set, and what is wrong.
class Report {
  public:
    explicit Report(const char* isa) : isa(isa) {}

    void begin(const char* op) { op_ = op, calls_ = numbers_ = 0, worst_ = 0; }
    void end() {
        std::printf("%-9s %-22s %5ld calls %8ld numbers, worst error %.2f of its bound\n", isa, op_, (long)calls_,
                    (long)numbers_, worst_);
    }

    // `got` is `want` up to rounding: a sum of `terms` numbers whose magnitudes add up to `scale`. Some hundred times e^-87
    // is as good as zero, as the kernels' e^x is zero from there on.
    void close(const char* what, float got, double want, double terms, double scale) {
        numbers_++;
        if (std::isnan(want) && std::isnan(got)) return;
        const double bound = kEps * (8 + std::sqrt(terms)) * scale + 1e-35;
        const double share = std::fabs(got - want) / bound;
        if (share > worst_) worst_ = share;
        if (!(share <= 1)) fail("%s is %.9g, expected %.9g, bound %.3g", what, (double)got, want, bound);
    }
    void same(const char* what, float got, float want) {
        numbers_++;
        if (std::memcmp(&got, &want, sizeof(float)) != 0) {
            fail("%s is %.9g, expected exactly %.9g", what, (double)got, (double)want, 0.0);
        }
    }

    // Calls with one thread; then with more, each time from the same start: the same bits, and nothing beside them.
    template <class Call>
    void run(std::vector<Array*> outputs, Call call) {
        calls_++;
        std::vector<std::vector<uint32_t>> start, one;
        for (const Array* output : outputs) start.push_back(output->bits());
        call(1);
        for (const Array* output : outputs) one.push_back(output->bits());
        for (const int threads : {2, 3, 7}) {
            for (size_t i = 0; i < outputs.size(); i++) outputs[i]->restore(start[i]);
            call(threads);
            for (size_t i = 0; i < outputs.size(); i++) {
                if (outputs[i]->bits() != one[i])
                    fail("%s %g has other bits with %g threads", "result", (double)i, threads, 0);
            }
        }
        for (size_t i = 0; i < outputs.size(); i++) {
            if (!outputs[i]->surroundings_are_whole())
                fail("%s %g: memory beside it was written", "result", (double)i, 0, 0);
        }
    }

    const char* isa;
    int64_t failures = 0;

  private:
    void fail(const char* format, const char* what, double a, double b, double c) {
        if (++failures > 20) return;
        std::printf("WRONG %s %s, call %ld: ", isa, op_, (long)calls_);
        std::printf(format, what, a, b, c);
        std::printf("\n");
    }

    const char* op_ = "";
    int64_t calls_ = 0, numbers_ = 0;
    double worst_ = 0;
};
