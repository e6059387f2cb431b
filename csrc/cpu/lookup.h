// SPDX-License-Identifier: Apache-2.0
// Tables of which every lane reads its own entry, searches in them, and lanes packed together.
#pragma once

#include <simd.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// One 32-bit place in a table per lane of Vec<T>.
template <class T>
struct Index;

#if defined(__AVX512F__)

template <>
struct Index<float> {
  __m512i v;
  FLASHMETRIC_INLINE explicit Index(int32_t all) : v(_mm512_set1_epi32(all)) {}
  static FLASHMETRIC_INLINE Index strided(int32_t stride) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Index i(stride);
    i.v = _mm512_mullo_epi32(i.v, lane);
    return i;
  }
  FLASHMETRIC_INLINE void advance(VecF::M where, int32_t step) {
    v = _mm512_mask_add_epi32(v, where.m, v, _mm512_set1_epi32(step));
  }
  FLASHMETRIC_INLINE void multiply(int32_t factor) {
    v = _mm512_mullo_epi32(v, _mm512_set1_epi32(factor));
  }
  FLASHMETRIC_INLINE VecF read(const float* table) const {
    return _mm512_i32gather_ps(v, table, sizeof(float));
  }
  FLASHMETRIC_INLINE void store(int32_t* out) const { _mm512_storeu_si512(out, v); }
};

template <>
struct Index<double> {
  __m256i v;
  FLASHMETRIC_INLINE explicit Index(int32_t all) : v(_mm256_set1_epi32(all)) {}
  static FLASHMETRIC_INLINE Index strided(int32_t stride) {
    Index i(stride);
    i.v = _mm256_mullo_epi32(i.v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return i;
  }
  FLASHMETRIC_INLINE void advance(VecD::M where, int32_t step) {
    v = _mm256_mask_add_epi32(v, where.m, v, _mm256_set1_epi32(step));
  }
  FLASHMETRIC_INLINE void multiply(int32_t factor) {
    v = _mm256_mullo_epi32(v, _mm256_set1_epi32(factor));
  }
  FLASHMETRIC_INLINE VecD read(const double* table) const {
    return _mm512_i32gather_pd(v, table, sizeof(double));
  }
  FLASHMETRIC_INLINE void store(int32_t* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v);
  }
};

// A table of kSize entries held in registers.
template <class T>
struct SmallTable;

template <>
struct SmallTable<float> {
  static constexpr int kSize = 32;
  __m512 low, high;
  FLASHMETRIC_INLINE explicit SmallTable(const float* p)
      : low(_mm512_loadu_ps(p)), high(_mm512_loadu_ps(p + 16)) {}
  // Entry at + shift.
  FLASHMETRIC_INLINE VecF read(Index<float> at, int shift) const {
    return _mm512_permutex2var_ps(low, _mm512_add_epi32(at.v, _mm512_set1_epi32(shift)), high);
  }
};

template <>
struct SmallTable<double> {
  static constexpr int kSize = 16;
  __m512d low, high;
  FLASHMETRIC_INLINE explicit SmallTable(const double* p)
      : low(_mm512_loadu_pd(p)), high(_mm512_loadu_pd(p + 8)) {}
  FLASHMETRIC_INLINE VecD read(Index<double> at, int shift) const {
    const __m256i place = _mm256_add_epi32(at.v, _mm256_set1_epi32(shift));
    return _mm512_permutex2var_pd(low, _mm512_cvtepi32_epi64(place), high);
  }
};

// Writes the lanes of `which` one behind the other, returns their number, and may write any number
// to the rest of a whole vector.
FLASHMETRIC_INLINE int pack_lanes(VecF v, VecF::M which, float* out) {
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(which.m, v.v));
  return __builtin_popcount(which.bits());
}
FLASHMETRIC_INLINE int pack_lanes(VecD v, VecD::M which, double* out) {
  _mm512_storeu_pd(out, _mm512_maskz_compress_pd(which.m, v.v));
  return __builtin_popcount(which.bits());
}

#else

#if defined(__AVX2__)

template <>
struct Index<float> {
  __m256i v;
  FLASHMETRIC_INLINE explicit Index(int32_t all) : v(_mm256_set1_epi32(all)) {}
  static FLASHMETRIC_INLINE Index strided(int32_t stride) {
    Index i(stride);
    i.v = _mm256_mullo_epi32(i.v, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return i;
  }
  FLASHMETRIC_INLINE void advance(VecF::M where, int32_t step) {
    const __m256i mask = _mm256_castps_si256(where.m);
    v = _mm256_add_epi32(v, _mm256_and_si256(mask, _mm256_set1_epi32(step)));
  }
  FLASHMETRIC_INLINE void multiply(int32_t factor) {
    v = _mm256_mullo_epi32(v, _mm256_set1_epi32(factor));
  }
  FLASHMETRIC_INLINE VecF read(const float* table) const {
    // The masked form: GCC 12 warns of an uninitialised variable in its own header for the other.
    const __m256 zero = _mm256_setzero_ps(), all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    return _mm256_mask_i32gather_ps(zero, table, v, all, sizeof(float));
  }
  FLASHMETRIC_INLINE void store(int32_t* out) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v);
  }
};

template <>
struct Index<double> {
  __m128i v;
  FLASHMETRIC_INLINE explicit Index(int32_t all) : v(_mm_set1_epi32(all)) {}
  static FLASHMETRIC_INLINE Index strided(int32_t stride) {
    Index i(stride);
    i.v = _mm_mullo_epi32(i.v, _mm_setr_epi32(0, 1, 2, 3));
    return i;
  }
  FLASHMETRIC_INLINE void advance(VecD::M where, int32_t step) {
    // The lower half of each lane's mask is as good as the whole.
    const __m256 wide = _mm256_castpd_ps(where.m);
    const __m128i mask = _mm_castps_si128(
        _mm_shuffle_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1), 0x88));
    v = _mm_add_epi32(v, _mm_and_si128(mask, _mm_set1_epi32(step)));
  }
  FLASHMETRIC_INLINE void multiply(int32_t factor) {
    v = _mm_mullo_epi32(v, _mm_set1_epi32(factor));
  }
  FLASHMETRIC_INLINE VecD read(const double* table) const {
    const __m256d zero = _mm256_setzero_pd(), all = _mm256_castsi256_pd(_mm256_set1_epi32(-1));
    return _mm256_mask_i32gather_pd(zero, table, v, all, sizeof(double));
  }
  FLASHMETRIC_INLINE void store(int32_t* out) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), v);
  }
};

// Without an instruction for it, a table of one.
template <class T>
struct SmallTable {
  static constexpr int kSize = 1;
  FLASHMETRIC_INLINE explicit SmallTable(const T*) {}
  FLASHMETRIC_INLINE Vec<T> read(Index<T>, int) const { return Vec<T>(0); }
};

template <>
struct SmallTable<float> {
  static constexpr int kSize = 8;
  __m256 entries;
  FLASHMETRIC_INLINE explicit SmallTable(const float* p) : entries(_mm256_loadu_ps(p)) {}
  FLASHMETRIC_INLINE VecF read(Index<float> at, int shift) const {
    return _mm256_permutevar8x32_ps(entries, _mm256_add_epi32(at.v, _mm256_set1_epi32(shift)));
  }
};

#else

template <class T>
struct Index {
  static constexpr int kLanes = Vec<T>::kLanes;
  int32_t v[kLanes];
  FLASHMETRIC_INLINE explicit Index(int32_t all) {
    for (int l = 0; l < kLanes; ++l) v[l] = all;
  }
  static FLASHMETRIC_INLINE Index strided(int32_t stride) {
    Index i(0);
    for (int l = 0; l < kLanes; ++l) i.v[l] = l * stride;
    return i;
  }
  FLASHMETRIC_INLINE void advance(typename Vec<T>::M where, int32_t step) {
    for (int l = 0; l < kLanes; ++l) v[l] += where.m[l] ? step : 0;
  }
  FLASHMETRIC_INLINE void multiply(int32_t factor) {
    for (int l = 0; l < kLanes; ++l) v[l] *= factor;
  }
  FLASHMETRIC_INLINE Vec<T> read(const T* table) const {
    Vec<T> entries(0);
    for (int l = 0; l < kLanes; ++l) entries.v[l] = table[v[l]];
    return entries;
  }
  FLASHMETRIC_INLINE void store(int32_t* out) const { __builtin_memcpy(out, v, sizeof(v)); }
};

template <class T>
struct SmallTable {
  static constexpr int kSize = 1;
  FLASHMETRIC_INLINE explicit SmallTable(const T*) {}
  FLASHMETRIC_INLINE Vec<T> read(Index<T>, int) const { return Vec<T>(0); }
};

#endif

template <class T>
FLASHMETRIC_INLINE int pack_lanes(Vec<T> v, typename Vec<T>::M which, T* out) {
  unsigned bits = which.bits();
  if (bits + 1 == 1u << Vec<T>::kLanes) {
    v.store(out);
    return Vec<T>::kLanes;
  }
  T lanes[Vec<T>::kLanes];
  v.store(lanes);
  int count = 0;
  for (; bits != 0; bits &= bits - 1) out[count++] = lanes[__builtin_ctz(bits)];
  return count;
}

#endif

// Ascending numbers are searched in steps of powers of two: rows of them are padded with +inf to
// `length`, which is one and leaves at least one place of padding.

// Moves `at` forward by the number of entries, from where each lane begins, that are below v
// (kOrEqual: or equal to it). A search through `length` entries has steps of length / 2, ... 1.
template <bool kOrEqual, class T>
FLASHMETRIC_INLINE void skip_below(const T* table, int32_t length, Vec<T> v, Index<T>& at) {
  for (int32_t step = length / 2; step > 0; step /= 2) {
    const Vec<T> entry = at.read(table + step - 1);
    at.advance(kOrEqual ? less_equal(entry, v) : less(entry, v), step);
  }
}

// Every stride-th entry of a row, held in registers; beyond the row, +inf.
template <class T>
FLASHMETRIC_INLINE SmallTable<T> sample(const T* row, int32_t length, int32_t stride) {
  T entries[SmallTable<T>::kSize];
  for (int32_t k = 0; k < SmallTable<T>::kSize; ++k) {
    const int32_t at = (k + 1) * stride - 1;
    entries[k] = at < length ? row[at] : static_cast<T>(__builtin_inff());
  }
  return SmallTable<T>(entries);
}

// Searches in one row, all lanes: the first steps are taken in registers, where they cost a tenth
// of those that read memory.
template <class T>
class RowSearch {
 public:
  RowSearch(const T* row, int32_t length)
      : row_(row),
        stride_(length > kSize ? length / kSize : 1),
        pivots_(sample(row, length, stride_)) {}

  // For each lane the number of entries below v (kOrEqual: or equal to it).
  template <bool kOrEqual>
  FLASHMETRIC_INLINE Index<T> count_below(Vec<T> v) const {
    Index<T> at(0);
#pragma GCC unroll 8
    for (int32_t step = kSize / 2; step > 0; step /= 2) {
      const Vec<T> entry = pivots_.read(at, step - 1);
      at.advance(kOrEqual ? less_equal(entry, v) : less(entry, v), step);
    }
    if (stride_ == 1 && kSize > 1) return at;
    at.multiply(stride_);
    skip_below<kOrEqual>(row_, stride_, v, at);
    return at;
  }

 private:
  static constexpr int kSize = SmallTable<T>::kSize;

  const T* row_;
  int32_t stride_;
  SmallTable<T> pivots_;
};

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
