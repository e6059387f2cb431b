// SPDX-License-Identifier: Apache-2.0
// AVX2 + FMA: 16 registers of 32 bytes, predicates as all-ones lanes.
#pragma once

#include <immintrin.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

constexpr int kSimdTileRows = 6;
constexpr int kSimdTileVecs = 2;

template <class T>
struct Vec;

struct MaskF {
  __m256 m;
  FLASHMETRIC_INLINE MaskF operator&(MaskF o) const { return {_mm256_and_ps(m, o.m)}; }
  FLASHMETRIC_INLINE MaskF operator|(MaskF o) const { return {_mm256_or_ps(m, o.m)}; }
  FLASHMETRIC_INLINE MaskF operator~() const {
    return {_mm256_xor_ps(m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
  }
  FLASHMETRIC_INLINE unsigned bits() const { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  FLASHMETRIC_INLINE bool any() const { return bits() != 0; }
};

struct MaskD {
  __m256d m;
  FLASHMETRIC_INLINE MaskD operator&(MaskD o) const { return {_mm256_and_pd(m, o.m)}; }
  FLASHMETRIC_INLINE MaskD operator|(MaskD o) const { return {_mm256_or_pd(m, o.m)}; }
  FLASHMETRIC_INLINE MaskD operator~() const {
    return {_mm256_xor_pd(m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))};
  }
  FLASHMETRIC_INLINE unsigned bits() const { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  FLASHMETRIC_INLINE bool any() const { return bits() != 0; }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  using M = MaskD;
  __m256d v;
  Vec() = default;
  FLASHMETRIC_INLINE Vec(__m256d x) : v(x) {}
  template <class S>
  FLASHMETRIC_INLINE explicit Vec(S s) : v(_mm256_set1_pd(static_cast<double>(s))) {}
  static FLASHMETRIC_INLINE __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FLASHMETRIC_INLINE Vec load(const double* p) { return _mm256_loadu_pd(p); }
  static FLASHMETRIC_INLINE Vec load_first(const double* p, int n) {
    return _mm256_maskload_pd(p, lanes_below(n));
  }
  FLASHMETRIC_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FLASHMETRIC_INLINE void store_first(double* p, int n) const {
    _mm256_maskstore_pd(p, lanes_below(n), v);
  }
  static FLASHMETRIC_INLINE M from(int n) {
    return {_mm256_castsi256_pd(_mm256_xor_si256(lanes_below(n), _mm256_set1_epi64x(-1)))};
  }
  static FLASHMETRIC_INLINE M differs(const int32_t* ids, int32_t id) {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ids));
    const __m128i same = _mm_cmpeq_epi32(loaded, _mm_set1_epi32(id));
    return {
        _mm256_castsi256_pd(_mm256_xor_si256(_mm256_cvtepi32_epi64(same), _mm256_set1_epi64x(-1)))};
  }
  // Which of the lanes' words share a bit with `word`.
  static FLASHMETRIC_INLINE M shares(const int64_t* words, int64_t word) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i none = _mm256_cmpeq_epi64(_mm256_and_si256(loaded, _mm256_set1_epi64x(word)),
                                            _mm256_setzero_si256());
    return {_mm256_castsi256_pd(_mm256_xor_si256(none, _mm256_set1_epi32(-1)))};
  }
  static FLASHMETRIC_INLINE M mask(unsigned bits) {
    const __m256i lanes = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi64x(bits), lanes);
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(set, lanes))};
  }
  FLASHMETRIC_INLINE double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
  FLASHMETRIC_INLINE double min() const {
    const __m128d s = _mm_min_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_min_sd(s, _mm_unpackhi_pd(s, s)));
  }
  FLASHMETRIC_INLINE double max() const {
    const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  using M = MaskF;
  __m256 v;
  Vec() = default;
  FLASHMETRIC_INLINE Vec(__m256 x) : v(x) {}
  template <class S>
  FLASHMETRIC_INLINE explicit Vec(S s) : v(_mm256_set1_ps(static_cast<float>(s))) {}
  static FLASHMETRIC_INLINE __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FLASHMETRIC_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static FLASHMETRIC_INLINE Vec load_first(const float* p, int n) {
    return _mm256_maskload_ps(p, lanes_below(n));
  }
  FLASHMETRIC_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FLASHMETRIC_INLINE void store_first(float* p, int n) const {
    _mm256_maskstore_ps(p, lanes_below(n), v);
  }
  static FLASHMETRIC_INLINE M from(int n) {
    return {_mm256_castsi256_ps(_mm256_xor_si256(lanes_below(n), _mm256_set1_epi32(-1)))};
  }
  static FLASHMETRIC_INLINE M differs(const int32_t* ids, int32_t id) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
    const __m256i same = _mm256_cmpeq_epi32(loaded, _mm256_set1_epi32(id));
    return {_mm256_castsi256_ps(_mm256_xor_si256(same, _mm256_set1_epi32(-1)))};
  }
  static FLASHMETRIC_INLINE M shares(const int64_t* words, int64_t word) {
    return mask(Vec<double>::shares(words, word).bits() |
                Vec<double>::shares(words + 4, word).bits() << 4);
  }
  static FLASHMETRIC_INLINE M mask(unsigned bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes))};
  }
  FLASHMETRIC_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  FLASHMETRIC_INLINE float min() const {
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
  }
  FLASHMETRIC_INLINE float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

FLASHMETRIC_INLINE VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator/(VecF a, VecF b) { return _mm256_div_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FLASHMETRIC_INLINE VecF sqrt(VecF a) { return _mm256_sqrt_ps(a.v); }
// Operand order makes a NaN in `a` survive, as in the scalar form.
FLASHMETRIC_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(b.v, a.v); }
FLASHMETRIC_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(b.v, a.v); }
FLASHMETRIC_INLINE VecF round(VecF a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n for integral n; in two steps, so that results may be subnormal.
FLASHMETRIC_INLINE VecF ldexp(VecF a, VecF n) {
  const __m256i all = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(all, 1);
  const auto power = [](__m256i k) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(all, half)));
}
FLASHMETRIC_INLINE MaskF less(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FLASHMETRIC_INLINE MaskF less_equal(VecF a, VecF b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)};
}
FLASHMETRIC_INLINE MaskF equal(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FLASHMETRIC_INLINE MaskF greater(VecF a, VecF b) { return less(b, a); }
FLASHMETRIC_INLINE VecF select(MaskF m, VecF a, VecF b) { return _mm256_blendv_ps(b.v, a.v, m.m); }

FLASHMETRIC_INLINE VecD operator+(VecD a, VecD b) { return _mm256_add_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator-(VecD a, VecD b) { return _mm256_sub_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator*(VecD a, VecD b) { return _mm256_mul_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator/(VecD a, VecD b) { return _mm256_div_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
FLASHMETRIC_INLINE VecD sqrt(VecD a) { return _mm256_sqrt_pd(a.v); }
FLASHMETRIC_INLINE VecD max(VecD a, VecD b) { return _mm256_max_pd(b.v, a.v); }
FLASHMETRIC_INLINE VecD min(VecD a, VecD b) { return _mm256_min_pd(b.v, a.v); }
FLASHMETRIC_INLINE VecD round(VecD a) {
  return _mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FLASHMETRIC_INLINE VecD ldexp(VecD a, VecD n) {
  const __m128i all = _mm256_cvtpd_epi32(n.v), half = _mm_srai_epi32(all, 1);
  const auto power = [](__m128i k) {
    const __m256i wide = _mm256_cvtepi32_epi64(_mm_add_epi32(k, _mm_set1_epi32(1023)));
    return _mm256_castsi256_pd(_mm256_slli_epi64(wide, 52));
  };
  return _mm256_mul_pd(_mm256_mul_pd(a.v, power(half)), power(_mm_sub_epi32(all, half)));
}
FLASHMETRIC_INLINE MaskD less(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
FLASHMETRIC_INLINE MaskD less_equal(VecD a, VecD b) {
  return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)};
}
FLASHMETRIC_INLINE MaskD equal(VecD a, VecD b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
FLASHMETRIC_INLINE MaskD greater(VecD a, VecD b) { return less(b, a); }
FLASHMETRIC_INLINE VecD select(MaskD m, VecD a, VecD b) { return _mm256_blendv_pd(b.v, a.v, m.m); }

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
