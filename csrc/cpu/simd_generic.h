// SPDX-License-Identifier: Apache-2.0
// Any processor: 16-byte vectors of the compiler (SSE2 on x86-64, NEON on Arm), no intrinsics.
#pragma once

namespace flashmetric {
namespace FLASHMETRIC_ISA {

constexpr int kSimdTileRows = 4;
constexpr int kSimdTileVecs = 2;

template <class T>
struct Vec;

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
};
template <>
struct VecTypes<double> {
  typedef double Reg __attribute__((vector_size(16)));
  typedef int64_t Int __attribute__((vector_size(16)));
};

template <class T>
struct Mask {
  using Int = typename VecTypes<T>::Int;
  static constexpr int kLanes = 16 / sizeof(T);
  Int m;
  FLASHMETRIC_INLINE Mask operator&(Mask o) const { return {m & o.m}; }
  FLASHMETRIC_INLINE Mask operator|(Mask o) const { return {m | o.m}; }
  FLASHMETRIC_INLINE Mask operator~() const { return {~m}; }
  FLASHMETRIC_INLINE unsigned bits() const {
    unsigned b = 0;
    for (int l = 0; l < kLanes; ++l) {
      const unsigned lane = m[l] ? 1u : 0u;
      b |= lane << l;
    }
    return b;
  }
  FLASHMETRIC_INLINE bool any() const { return bits() != 0; }
};

template <class T>
struct Vec {
  using Reg = typename VecTypes<T>::Reg;
  using M = Mask<T>;
  static constexpr int kLanes = M::kLanes;
  Reg v;
  Vec() = default;
  FLASHMETRIC_INLINE Vec(Reg x) : v(x) {}
  template <class S>
  FLASHMETRIC_INLINE explicit Vec(S s) : v(Reg{} + static_cast<T>(s)) {}
  static FLASHMETRIC_INLINE Vec load(const T* p) {
    Reg r;
    __builtin_memcpy(&r, p, sizeof(r));
    return r;
  }
  static FLASHMETRIC_INLINE Vec load_first(const T* p, int n) {
    Reg r{};
    for (int l = 0; l < n; ++l) r[l] = p[l];
    return r;
  }
  FLASHMETRIC_INLINE void store(T* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  FLASHMETRIC_INLINE void store_first(T* p, int n) const {
    for (int l = 0; l < n; ++l) p[l] = v[l];
  }
  static FLASHMETRIC_INLINE M from(int n) {
    M mask;
    for (int l = 0; l < kLanes; ++l) mask.m[l] = l >= n ? -1 : 0;
    return mask;
  }
  static FLASHMETRIC_INLINE M differs(const int32_t* ids, int32_t id) {
    M mask;
    for (int l = 0; l < kLanes; ++l) mask.m[l] = ids[l] != id ? -1 : 0;
    return mask;
  }
  // Which of the lanes' words share a bit with `word`.
  static FLASHMETRIC_INLINE M shares(const int64_t* words, int64_t word) {
    M mask;
    for (int l = 0; l < kLanes; ++l) mask.m[l] = (words[l] & word) != 0 ? -1 : 0;
    return mask;
  }
  static FLASHMETRIC_INLINE M mask(unsigned bits) {
    M mask;
    for (int l = 0; l < kLanes; ++l) mask.m[l] = (bits >> l & 1) != 0 ? -1 : 0;
    return mask;
  }
  FLASHMETRIC_INLINE T sum() const {
    T s = v[0];
    for (int l = 1; l < kLanes; ++l) s += v[l];
    return s;
  }
  FLASHMETRIC_INLINE T min() const {
    T s = v[0];
    for (int l = 1; l < kLanes; ++l) s = v[l] < s ? v[l] : s;
    return s;
  }
  FLASHMETRIC_INLINE T max() const {
    T s = v[0];
    for (int l = 1; l < kLanes; ++l) s = v[l] > s ? v[l] : s;
    return s;
  }
};

template <class T>
FLASHMETRIC_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.v * b.v + c.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> sqrt(Vec<T> a) {
  for (int l = 0; l < Vec<T>::kLanes; ++l) a.v[l] = flashmetric::sqrt(a.v[l]);
  return a;
}
template <class T>
FLASHMETRIC_INLINE Mask<T> less(Vec<T> a, Vec<T> b) {
  return {a.v < b.v};
}
template <class T>
FLASHMETRIC_INLINE Mask<T> less_equal(Vec<T> a, Vec<T> b) {
  return {a.v <= b.v};
}
template <class T>
FLASHMETRIC_INLINE Mask<T> equal(Vec<T> a, Vec<T> b) {
  return {a.v == b.v};
}
template <class T>
FLASHMETRIC_INLINE Mask<T> greater(Vec<T> a, Vec<T> b) {
  return {a.v > b.v};
}
template <class T>
FLASHMETRIC_INLINE Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return m.m ? a.v : b.v;
}
template <class T>
FLASHMETRIC_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(less(a, b), b, a);
}
template <class T>
FLASHMETRIC_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(less(b, a), b, a);
}
// To the nearest integer, for |a| < 2^22: larger numbers are not rounded.
template <class T>
FLASHMETRIC_INLINE Vec<T> round(Vec<T> a) {
  // Adding this number leaves no bits for a fraction.
  const Vec<T> shift(sizeof(T) == 4 ? 12582912.0 : 6755399441055744.0);
  return (a + shift) - shift;
}
// a * 2^n for integral n; in two steps, so that results may be subnormal.
template <class T>
FLASHMETRIC_INLINE Vec<T> ldexp(Vec<T> a, Vec<T> n) {
  using Int = typename VecTypes<T>::Int;
  using Reg = typename VecTypes<T>::Reg;
  constexpr int kBias = sizeof(T) == 4 ? 127 : 1023, kShift = sizeof(T) == 4 ? 23 : 52;
  const Int all = __builtin_convertvector(n.v, Int), half = all >> 1;
  const Int low = (half + kBias) << kShift, high = (all - half + kBias) << kShift;
  return a.v * reinterpret_cast<Reg>(low) * reinterpret_cast<Reg>(high);
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
