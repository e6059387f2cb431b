// SPDX-License-Identifier: Apache-2.0
// All pairs of one block: what every kernel that looks at whole rows of pairs begins with.
//
//   PairBlock<T> pairs(batch, block, tile);   // tile: kMaxBlockRows^2 elements at least
//   pairs.fill();                             // inner products, or u where there are none
//   Kinds<T> kinds;
//   for (int64_t i = block.row_begin; i < block.row_end; ++i) {
//     if (!pairs.label(i, kinds)) continue;   // which columns are positives, which negatives
//     pairs.measure(i, kinds);                // line(i): u, near pairs by exact differences
//     pairs.to_distance(i, kinds);            // line(i): distances
//   }
//
// line(i)[c] belongs to column block.col_begin + c. Masks are stored as the bits of one vector per
// word: bit l of word v is column v * kLanes + l. Entries of a line that no mask names are
// arbitrary (stale, infinite or NaN): select before use. A line stays in first-level cache from one
// step to the next, and each step is one loop for all pairs with its formula chosen per row:
// kernels are not multiplied by distances and formulas.
#pragma once

#include <gram.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// The bits of a vector's lanes.
typedef uint16_t Bits;

// One row of a block: which columns are what.
template <class T>
struct Kinds {
  static constexpr int kVecs = (kMaxBlockRows / Vec<T>::kLanes + 3) / 4 * 4;
  Bits positive[kVecs], negative[kVecs];
  Bits near[kVecs];  // measured by exact differences: their gradient must be, too
  Bits live[kVecs];  // numbers of the vectors that measure() left any pair in
  int64_t live_count;

  FLASHMETRIC_INLINE unsigned any(int64_t v) const {
    return static_cast<unsigned>(positive[v]) | negative[v];
  }
};

// What PairBlock::measure narrows the pairs to: here all.
struct AllPairs {
  template <class V>
  FLASHMETRIC_INLINE void operator()(V, V, int64_t, unsigned&, unsigned&) const {}
};

template <class A, class B>
constexpr bool same_type = false;
template <class A>
constexpr bool same_type<A, A> = true;

template <class T>
class PairBlock {
 public:
  static constexpr int kLanes = Tile<T>::kLanes;

  // label() names pairs of the wanted kinds only.
  PairBlock(const PairBatch<T>& batch, const Block& block, T* tile, bool positives = true,
            bool negatives = true)
      : batch_(batch),
        block_(block),
        tile_(tile),
        width_((block.col_end - block.col_begin + Tile<T>::kCols - 1) / Tile<T>::kCols *
               Tile<T>::kCols),
        difference_(is_difference(batch.distance)),
        unit_(has_unit_rows(batch.distance)) {
    for (int64_t v = 0; v < vecs(); ++v) {
      unsigned valid = 0, zero = 0;
      for (int l = 0; l < kLanes; ++l) {
        const int64_t j = block.col_begin + v * kLanes + l;
        valid |= static_cast<unsigned>(batch.ref_labels.classes[j] >= 0) << l;
        zero |= static_cast<unsigned>(unit_ && batch.ref.norms[j] == T(0)) << l;
      }
      positives_[v] = static_cast<Bits>(positives ? valid : 0);
      negatives_[v] = static_cast<Bits>(negatives ? valid : 0);
      zero_[v] = static_cast<Bits>(zero);
      any_zero_ = any_zero_ || zero != 0;
    }
  }

  int64_t width() const { return width_; }  // of a line: whole panels
  int64_t vecs() const { return width_ / kLanes; }
  T* line(int64_t i) const { return tile_ + (i - block_.row_begin) * width_; }

  // Inner products of all pairs; direct distances: u. A diagonal block needs no pair below its
  // diagonal.
  void fill() const {
    if (batch_.distance == Distance::kCityblock) return fill_with<Cityblock>();
    if (batch_.distance == Distance::kChi2) return fill_with<Chi2>();
    fill_with<Dot>();
  }

  // Sets positive and negative; whether the row has any pair here.
  bool label(int64_t i, Kinds<T>& kinds) const {
    const int32_t own = batch_.query_labels.classes[i];
    if (own == kIgnoredClass) return false;
    unsigned any = 0;
    if (batch_.rule == Rule::kAny) {
      any = label_by_bits(i, kinds);
    } else if (batch_.rule == Rule::kGroup) {
      any = label_by_group(i, kinds);
    } else {
      const int32_t* classes = batch_.ref_labels.classes + block_.col_begin;
      for (int64_t v = 0; v < vecs(); ++v) {
        const unsigned other = Vec<T>::differs(classes + v * kLanes, own).bits();
        any |= set(kinds, v, ~other, other);
      }
    }
    const int64_t at = i - block_.col_begin;
    if (batch_.self && at >= 0 && at < width_) any = leave_out(at, kinds);
    return any != 0;
  }

  // Turns line(i) from products into u. `narrow(u, near_below, v, positive, negative)` may clear
  // bits of pairs of vector v that do not matter, except where u < near_below: those are measured
  // by exact differences. Returns whether the row has any pair left.
  template <class Narrow = AllPairs>
  FLASHMETRIC_INLINE bool measure(int64_t i, Kinds<T>& kinds, const Narrow& narrow = {}) const {
    constexpr bool kNarrows = !same_type<Narrow, AllPairs>;
    T* u = line(i);
    const T* ref_bias = batch_.ref.bias + block_.col_begin;
    const Vec<T> bias(batch_.query.bias[i]), factor(is_direct(batch_.distance) ? 1 : -2);
    // NaN, below which is nothing: only differences of near rows lose digits.
    const Vec<T> fraction(difference_ ? kNearFraction : __builtin_nan(""));
    const bool any_apart = !none_apart(i);
    const int64_t count = vecs();
    for (int64_t v = 0; v < count; v += 4) __builtin_memset(kinds.near + v, 0, 4 * sizeof(Bits));
    unsigned any_near = 0;
    int64_t live_count = 0;
    // Without branches on what is left: they would be mispredicted.
    for (int64_t v = 0; v < count; ++v) {
      unsigned positive = kinds.positive[v], negative = kinds.negative[v];
      const int64_t c = v * kLanes;
      const Vec<T> size = bias + Vec<T>::load(ref_bias + c), near_below = fraction * size;
      Vec<T> all = fma(factor, Vec<T>::load(u + c), size);
      // A zero row is at a constant distance from every row, to the bit.
      if (__builtin_expect(any_apart, 0)) all = select(Vec<T>::mask(apart(i, v)), Vec<T>(2), all);
      if constexpr (kNarrows) {
        narrow(all, near_below, v, positive, negative);
        kinds.positive[v] = static_cast<Bits>(positive);
        kinds.negative[v] = static_cast<Bits>(negative);
      }
      const unsigned left = positive | negative;
      const auto mask = Vec<T>::mask(left);
      select(mask, all, Vec<T>(0)).store(u + c);
      kinds.live[live_count] = static_cast<Bits>(v);
      live_count += left != 0;
      const unsigned near = (less(all, near_below) & mask).bits();
      if (__builtin_expect(near != 0, 0)) {
        kinds.near[v] = static_cast<Bits>(near);
        any_near = 1;
      }
    }
    kinds.live_count = live_count;
    if (__builtin_expect(any_near != 0, 0)) measure_near(i, kinds);
    return live_count != 0;
  }

  // Turns line(i) from u into distances, where any pair is left.
  void to_distance(int64_t i, const Kinds<T>& kinds) const {
    T* p = line(i);
    with_distance(batch_.distance, [&](auto distance) {
      for (int64_t t = 0; t < kinds.live_count; ++t) {
        T* at = p + kinds.live[t] * kLanes;
        decltype(distance)::value(Vec<T>::load(at)).store(at);
      }
    });
  }

  // Whether for_each_vector() serves row i: single classes, no pair at a constant distance, and a
  // block that does not hold the row itself.
  bool plain(int64_t i) const {
    return batch_.rule == Rule::kEqual && !is_direct(batch_.distance) && none_apart(i) &&
           !(batch_.self && i >= block_.col_begin && i < block_.col_begin + width_);
  }

  // label() and measure() of a plain row in one loop, with nothing kept for later: calls
  // f(v, u, positive, negative, near) for every vector of the line. Whether the row is in pairs.
  template <class F>
  FLASHMETRIC_INLINE bool for_each_vector(int64_t i, F&& f) const {
    const int32_t own = batch_.query_labels.classes[i];
    if (own == kIgnoredClass) return false;
    const T* products = line(i);
    const T* ref_bias = batch_.ref.bias + block_.col_begin;
    const int32_t* classes = batch_.ref_labels.classes + block_.col_begin;
    const Vec<T> bias(batch_.query.bias[i]), factor(-2);
    const Vec<T> fraction(difference_ ? kNearFraction : __builtin_nan(""));
    const int64_t count = vecs();
    for (int64_t v = 0; v < count; ++v) {
      const int64_t c = v * kLanes;
      const Vec<T> size = bias + Vec<T>::load(ref_bias + c);
      Vec<T> u = fma(factor, Vec<T>::load(products + c), size);
      const unsigned other = Vec<T>::differs(classes + c, own).bits();
      const unsigned positive = ~other & positives_[v], negative = other & negatives_[v];
      const unsigned near = less(u, fraction * size).bits() & (positive | negative);
      if (__builtin_expect(near != 0, 0)) u = near_lanes(i, v, near, u);
      f(v, u, positive, negative, near);
    }
    return true;
  }

  // Whether apart() is 0 for all of row i.
  bool none_apart(int64_t i) const {
    return !unit_ || (!any_zero_ && batch_.query.norms[i] != T(0));
  }
  // Lanes of vector v that have a zero row on either side, where that sets a pair apart: at a
  // constant distance, with no gradient.
  unsigned apart(int64_t i, int64_t v) const {
    return unit_ && batch_.query.norms[i] == T(0) ? kAll : zero_[v];
  }

 private:
  static constexpr unsigned kAll = (1u << kLanes) - 1;

  template <class D>
  void fill_with() const {
    constexpr int64_t kRows = Tile<T>::kRows, kCols = Tile<T>::kCols;
    const Side<T>& ref = batch_.ref;
    for (int64_t j = block_.col_begin; j < block_.col_end; j += kCols) {
      int64_t end = block_.row_end;
      if (block_.diagonal && j + kCols < end)
        end = block_.row_begin + (j + kCols - block_.row_begin + kRows - 1) / kRows * kRows;
      gram_panel<D>(batch_.query, block_.row_begin, end < block_.row_end ? end : block_.row_end,
                    ref.panels + j * ref.d, tile_ + (j - block_.col_begin), width_);
    }
  }

  FLASHMETRIC_INLINE unsigned set(Kinds<T>& kinds, int64_t v, unsigned positive,
                                  unsigned negative) const {
    positive &= positives_[v];
    negative &= negatives_[v];
    kinds.positive[v] = static_cast<Bits>(positive);
    kinds.negative[v] = static_cast<Bits>(negative);
    return positive | negative;
  }

  unsigned label_by_bits(int64_t i, Kinds<T>& kinds) const {
    const Labels &own = batch_.query_labels, &other = batch_.ref_labels;
    unsigned any = 0;
    for (int64_t v = 0; v < vecs(); ++v) {
      unsigned common = 0;
      for (int64_t w = 0; w < batch_.words; ++w) {
        const int64_t* words = other.words + w * other.padded + block_.col_begin + v * kLanes;
        common |= Vec<T>::shares(words, own.words[w * own.padded + i]).bits();
      }
      any |= set(kinds, v, common, ~common);
    }
    return any;
  }

  unsigned label_by_group(int64_t i, Kinds<T>& kinds) const {
    const Labels &own = batch_.query_labels, &other = batch_.ref_labels;
    unsigned any = 0;
    for (int64_t v = 0; v < vecs(); ++v) {
      const int64_t j = block_.col_begin + v * kLanes;
      const unsigned other_class = Vec<T>::differs(other.classes + j, own.classes[i]).bits();
      const unsigned other_group = Vec<T>::differs(other.groups + j, own.groups[i]).bits();
      any |= set(kinds, v, ~other_class & allowed(batch_.positive_groups, other_group),
                 other_class & allowed(batch_.negative_groups, other_group));
    }
    return any;
  }

  static FLASHMETRIC_INLINE unsigned allowed(GroupRule rule, unsigned other_group) {
    return rule == GroupRule::kAny ? kAll : rule == GroupRule::kSame ? ~other_group : other_group;
  }

  // In a self-batch: not the row itself, which is column `own`, and in a diagonal block nothing up
  // to it.
  unsigned leave_out(int64_t own, Kinds<T>& kinds) const {
    const int64_t at = own / kLanes;
    const unsigned bit = 1u << (own % kLanes);
    const unsigned keep = block_.diagonal ? ~((bit << 1) - 1) : ~bit;
    kinds.positive[at] = static_cast<Bits>(kinds.positive[at] & keep);
    kinds.negative[at] = static_cast<Bits>(kinds.negative[at] & keep);
    unsigned any = 0;
    for (int64_t v = 0; v < vecs(); ++v) {
      if (block_.diagonal && v < at) kinds.positive[v] = kinds.negative[v] = 0;
      any |= kinds.any(v);
    }
    return any;
  }

  void measure_near(int64_t i, const Kinds<T>& kinds) const {
    int32_t list[kMaxBlockRows] = {};
    T u[kMaxBlockRows];
    int64_t count = 0;
    for (int64_t v = 0; v < vecs(); ++v) count = list_lanes(v, kinds.near[v], list, count);
    // Zero rows are never near: all difference distances have the same u here.
    exact<Sqeuclidean>(batch_.query.rows + i * batch_.query.d, batch_.query.norms[i], batch_.ref,
                       list, count, u);
    for (int64_t t = 0; t < count; ++t) line(i)[list[t] - block_.col_begin] = u[t];
  }

  int64_t list_lanes(int64_t v, unsigned bits, int32_t* list, int64_t count) const {
    for (; bits != 0; bits &= bits - 1)
      list[count++] = static_cast<int32_t>(block_.col_begin + v * kLanes + __builtin_ctz(bits));
    return count;
  }

  // u with the named lanes measured by exact differences.
  __attribute__((noinline)) Vec<T> near_lanes(int64_t i, int64_t v, unsigned bits, Vec<T> u) const {
    int32_t list[kLanes] = {};
    T measured[kLanes], all[kLanes];
    const int64_t count = list_lanes(v, bits, list, 0);
    exact<Sqeuclidean>(batch_.query.rows + i * batch_.query.d, batch_.query.norms[i], batch_.ref,
                       list, count, measured);
    u.store(all);
    for (int64_t t = 0; t < count; ++t) all[list[t] - block_.col_begin - v * kLanes] = measured[t];
    return Vec<T>::load(all);
  }

  const PairBatch<T>& batch_;
  const Block& block_;
  T* const tile_;
  const int64_t width_;
  const bool difference_, unit_;
  bool any_zero_ = false;
  Bits positives_[Kinds<T>::kVecs];  // columns that are in pairs at all, if the kind is wanted
  Bits negatives_[Kinds<T>::kVecs];
  Bits zero_[Kinds<T>::kVecs];  // columns of zero rows, where unit rows are expected
};

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
