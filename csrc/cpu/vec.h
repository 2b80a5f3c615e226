// Vec: as many floats as one register of the instruction set holds, and loops over rows of any length in Vecs.
//
// A loop body is written once, as a function of (i, lanes): `lanes.load` and `lanes.store` move all kLanes floats from
// i on, or, at the end of a row whose length is no multiple, only those that are left.
#pragma once

namespace cocoop_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512F__) || defined(COCOOP_FAST_NEON)
constexpr int kRegisters = 32;  // of Vecs
#else
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec broadcast(float value) { return value - Vec{}; }
inline IntVec bits(Vec v) { return (IntVec)v; }
inline Vec from_bits(IntVec v) { return (Vec)v; }
inline Vec load(const float* p) { return *(const UnalignedVec*)p; }
inline void store(float* p, Vec v) { *(UnalignedVec*)p = v; }

inline IntVec lane_index() {
    IntVec index;
    for (int i = 0; i < kLanes; i++) index[i] = i;
    return index;
}

// Lanes 0 .. n - 1 from memory, zeros above; nothing beyond them is read.
inline Vec load_first(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (Vec)_mm256_maskload_ps(p, (__m256i)(lane_index() < (int32_t)n));
#elif defined(COCOOP_FAST_NEON)
    if (n >= kLanes) return load(p);
    float32x4_t v = vdupq_n_f32(0.0f);
    if (n & 2) v = vcombine_f32(vld1_f32(p), vget_low_f32(v));
    if (n == 1) v = vld1q_lane_f32(p, v, 0);
    if (n == 3) v = vld1q_lane_f32(p + 2, v, 2);
    return (Vec)v;
#else
    Vec v{};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
#endif
}

inline void store_first(float* p, Vec v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)(lane_index() < (int32_t)n), (__m256)v);
#elif defined(COCOOP_FAST_NEON)
    if (n >= kLanes) return store(p, v);
    if (n & 2) vst1_f32(p, vget_low_f32((float32x4_t)v));
    if (n == 1) vst1q_lane_f32(p, (float32x4_t)v, 0);
    if (n == 3) vst1q_lane_f32(p + 2, (float32x4_t)v, 2);
#else
    for (int i = 0; i < n; i++) p[i] = v[i];
#endif
}

// For what is not read again soon. It bypasses the caches: a usual store would first read the line, and push out others. An
// address that is no multiple of a register's size gets a usual store.
inline void store_far(float* p, Vec v) {
#if defined(__AVX512F__)
    if ((uintptr_t)p % sizeof(v) == 0) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    if ((uintptr_t)p % sizeof(v) == 0) return _mm256_stream_ps(p, (__m256)v);
#endif
    store(p, v);
}

// Other threads see what this one stored far before they see what it stores from now on.
inline void settle_far_stores() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Adds the upper half of the lanes to the lower until four are left.
inline float sum_lanes(Vec v) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad parts[kLanes / 4];
    std::memcpy(parts, &v, sizeof(v));
    for (int half = kLanes / 8; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    }
    const Quad four = parts[0];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

struct AllLanes {
    Vec load(const float* p) const { return cocoop_fast::load(p); }
    void store(float* p, Vec v) const { cocoop_fast::store(p, v); }
    void store_far(float* p, Vec v) const { cocoop_fast::store_far(p, v); }
};

struct FirstLanes {
    int64_t n;
    Vec load(const float* p) const { return load_first(p, n); }
    void store(float* p, Vec v) const { store_first(p, v, n); }
    void store_far(float* p, Vec v) const { store_first(p, v, n); }
};

// body(i, lanes) over i = 0, kLanes, 2 kLanes, ... below n.
template <class Body>
inline void for_each(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, AllLanes{});
    if (i < n) body(i, FirstLanes{n - i});
}

// The sum over i < n of term(i, lanes), lane by lane, in an order that depends on n alone.
template <class Term>
inline float sum(int64_t n, Term term) {
    Vec a{}, b{}, c{}, d{};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        a += term(i, AllLanes{});
        b += term(i + kLanes, AllLanes{});
        c += term(i + 2 * kLanes, AllLanes{});
        d += term(i + 3 * kLanes, AllLanes{});
    }
    for (; i + kLanes <= n; i += kLanes) a += term(i, AllLanes{});
    if (i < n) {
        const Vec last = term(i, FirstLanes{n - i});
        b += lane_index() < (int32_t)(n - i) ? last : Vec{};
    }
    return sum_lanes((a + b) + (c + d));
}

inline float dot(const float* a, const float* b, int64_t n) {
    return sum(n, [=](int64_t i, auto lanes) { return lanes.load(a + i) * lanes.load(b + i); });
}

// out = sum over s of weight(s) * row(s), each row of n floats; the rows in ascending order.
template <int count, class Weight, class Row>
inline void weighted_sum_block(float* out, int64_t rows, Weight weight, Row row, int64_t i) {
    Vec acc[count] = {};
    for (int64_t s = 0; s < rows; s++) {
        const float w = weight(s);
        const float* r = row(s) + i;
        for (int c = 0; c < count; c++) acc[c] += w * load(r + c * kLanes);
    }
    for (int c = 0; c < count; c++) store(out + i + c * kLanes, acc[c]);
}

template <class Weight, class Row>
inline void weighted_sum(float* out, int64_t n, int64_t rows, Weight weight, Row row) {
    // Accumulators kept in registers: those of a head of 64, but no more than half of the registers.
    constexpr int block = 64 / kLanes < kRegisters / 2 ? 64 / kLanes : kRegisters / 2;
    int64_t i = 0;
    for (; i + block * kLanes <= n; i += block * kLanes) weighted_sum_block<block>(out, rows, weight, row, i);
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) weighted_sum_block<2>(out, rows, weight, row, i);
    for (; i + kLanes <= n; i += kLanes) weighted_sum_block<1>(out, rows, weight, row, i);
    if (i < n) {
        Vec acc{};
        for (int64_t s = 0; s < rows; s++) acc += weight(s) * load_first(row(s) + i, n - i);
        store_first(out + i, acc, n - i);
    }
}

template <class Float>
inline Float* row_of(const Rows<Float>& rows, int64_t r) {
    return rows.data + (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace
}  // namespace cocoop_fast
