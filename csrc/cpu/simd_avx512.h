// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL): 32 registers of 64 bytes, predicates in mask registers.
#pragma once

#include <immintrin.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

constexpr int kSimdTileRows = 8;
constexpr int kSimdTileVecs = 3;

template <class Bits>
struct Mask {
  Bits m;
  FLASHMETRIC_INLINE Mask operator&(Mask o) const { return {static_cast<Bits>(m & o.m)}; }
  FLASHMETRIC_INLINE Mask operator|(Mask o) const { return {static_cast<Bits>(m | o.m)}; }
  FLASHMETRIC_INLINE Mask operator~() const { return {static_cast<Bits>(~m)}; }
  FLASHMETRIC_INLINE bool any() const { return m != 0; }
  FLASHMETRIC_INLINE unsigned bits() const { return m; }
};

template <class T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  using M = Mask<__mmask16>;
  __m512 v;
  Vec() = default;
  FLASHMETRIC_INLINE Vec(__m512 x) : v(x) {}
  template <class S>
  FLASHMETRIC_INLINE explicit Vec(S s) : v(_mm512_set1_ps(static_cast<float>(s))) {}
  static FLASHMETRIC_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static FLASHMETRIC_INLINE Vec load_first(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  FLASHMETRIC_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FLASHMETRIC_INLINE void store_first(float* p, int n) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
  }
  static FLASHMETRIC_INLINE M from(int n) { return {static_cast<__mmask16>(~0u << n)}; }
  static FLASHMETRIC_INLINE M differs(const int32_t* ids, int32_t id) {
    return {_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(ids), _mm512_set1_epi32(id))};
  }
  // Which of the lanes' words share a bit with `word`.
  static FLASHMETRIC_INLINE M shares(const int64_t* words, int64_t word) {
    const __m512i w = _mm512_set1_epi64(word);
    const unsigned low = _mm512_test_epi64_mask(_mm512_loadu_si512(words), w);
    const unsigned high = _mm512_test_epi64_mask(_mm512_loadu_si512(words + 8), w);
    return {static_cast<__mmask16>(low | high << 8)};
  }
  static FLASHMETRIC_INLINE M mask(unsigned bits) { return {static_cast<__mmask16>(bits)}; }
  FLASHMETRIC_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  FLASHMETRIC_INLINE float min() const { return _mm512_reduce_min_ps(v); }
  FLASHMETRIC_INLINE float max() const { return _mm512_reduce_max_ps(v); }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  using M = Mask<__mmask8>;
  __m512d v;
  Vec() = default;
  FLASHMETRIC_INLINE Vec(__m512d x) : v(x) {}
  template <class S>
  FLASHMETRIC_INLINE explicit Vec(S s) : v(_mm512_set1_pd(static_cast<double>(s))) {}
  static FLASHMETRIC_INLINE Vec load(const double* p) { return _mm512_loadu_pd(p); }
  static FLASHMETRIC_INLINE Vec load_first(const double* p, int n) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
  }
  FLASHMETRIC_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FLASHMETRIC_INLINE void store_first(double* p, int n) const {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
  }
  static FLASHMETRIC_INLINE M from(int n) { return {static_cast<__mmask8>(~0u << n)}; }
  static FLASHMETRIC_INLINE M differs(const int32_t* ids, int32_t id) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids));
    return {_mm256_cmpneq_epi32_mask(loaded, _mm256_set1_epi32(id))};
  }
  // Which of the lanes' words share a bit with `word`.
  static FLASHMETRIC_INLINE M shares(const int64_t* words, int64_t word) {
    const __m512i w = _mm512_set1_epi64(word);
    return {_mm512_test_epi64_mask(_mm512_loadu_si512(words), w)};
  }
  static FLASHMETRIC_INLINE M mask(unsigned bits) { return {static_cast<__mmask8>(bits)}; }
  FLASHMETRIC_INLINE double sum() const { return _mm512_reduce_add_pd(v); }
  FLASHMETRIC_INLINE double min() const { return _mm512_reduce_min_pd(v); }
  FLASHMETRIC_INLINE double max() const { return _mm512_reduce_max_pd(v); }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

FLASHMETRIC_INLINE VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF operator/(VecF a, VecF b) { return _mm512_div_ps(a.v, b.v); }
FLASHMETRIC_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FLASHMETRIC_INLINE VecF sqrt(VecF a) { return _mm512_sqrt_ps(a.v); }
// Operand order makes a NaN in `a` survive, as in the scalar form.
FLASHMETRIC_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(b.v, a.v); }
FLASHMETRIC_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(b.v, a.v); }
FLASHMETRIC_INLINE VecF round(VecF a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FLASHMETRIC_INLINE VecF ldexp(VecF a, VecF n) { return _mm512_scalef_ps(a.v, n.v); }
FLASHMETRIC_INLINE VecF::M less(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
FLASHMETRIC_INLINE VecF::M less_equal(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
FLASHMETRIC_INLINE VecF::M equal(VecF a, VecF b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
FLASHMETRIC_INLINE VecF::M greater(VecF a, VecF b) { return less(b, a); }
FLASHMETRIC_INLINE VecF select(VecF::M m, VecF a, VecF b) {
  return _mm512_mask_mov_ps(b.v, m.m, a.v);
}

FLASHMETRIC_INLINE VecD operator+(VecD a, VecD b) { return _mm512_add_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator-(VecD a, VecD b) { return _mm512_sub_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator*(VecD a, VecD b) { return _mm512_mul_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD operator/(VecD a, VecD b) { return _mm512_div_pd(a.v, b.v); }
FLASHMETRIC_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
FLASHMETRIC_INLINE VecD sqrt(VecD a) { return _mm512_sqrt_pd(a.v); }
FLASHMETRIC_INLINE VecD max(VecD a, VecD b) { return _mm512_max_pd(b.v, a.v); }
FLASHMETRIC_INLINE VecD min(VecD a, VecD b) { return _mm512_min_pd(b.v, a.v); }
FLASHMETRIC_INLINE VecD round(VecD a) {
  return _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FLASHMETRIC_INLINE VecD ldexp(VecD a, VecD n) { return _mm512_scalef_pd(a.v, n.v); }
FLASHMETRIC_INLINE VecD::M less(VecD a, VecD b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)};
}
FLASHMETRIC_INLINE VecD::M less_equal(VecD a, VecD b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)};
}
FLASHMETRIC_INLINE VecD::M equal(VecD a, VecD b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)};
}
FLASHMETRIC_INLINE VecD::M greater(VecD a, VecD b) { return less(b, a); }
FLASHMETRIC_INLINE VecD select(VecD::M m, VecD a, VecD b) {
  return _mm512_mask_mov_pd(b.v, m.m, a.v);
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
