// SPDX-License-Identifier: Apache-2.0
// Pairs picked by their distance: nearest_beyond and row_top_k. Both look for low keys, d or -d,
// and after the first blocks few pairs are low enough: the common case is a vector of 16 pairs
// settled by a compare or two.
#pragma once

#include <block.h>
#include <flashmetric/row_kernels.h>
#include <lookup.h>

namespace flashmetric {
namespace FLASHMETRIC_ISA {

// Calls use(i, distances, kinds) for every row of a block that has pairs of the kind.
template <class T, class F>
FLASHMETRIC_INLINE void for_rows(const PairBatch<T>& batch, const Block& block, bool positives,
                                 T* tile, const F& use) {
  PairBlock<T> pairs(batch, block, tile, positives, !positives);
  pairs.fill();
  Kinds<T> kinds;
  for (int64_t i = block.row_begin; i < block.row_end; ++i) {
    if (!pairs.label(i, kinds)) continue;
    pairs.measure(i, kinds);
    pairs.to_distance(i, kinds);
    use(i, pairs, kinds);
  }
}

template <class T>
class BeyondRow {
 public:
  BeyondRow(const NearestBeyond<T>& op, int64_t i)
      : op_(op),
        limits_(op.limits.row(i)),
        key_(op.key + i * op.limits.length),
        index_(op.index + i * op.limits.length) {}

  void run(const T* d, const Kinds<T>& kinds, int64_t vecs, int64_t col_begin) {
    if (op_.limits.count <= kFewLimits) {
      sweep(d, kinds, vecs, col_begin, [&](Vec<T> key) {
        auto hit = none();
        for (int64_t k = 0; k < op_.limits.count; ++k)
          hit = hit | (greater(key, Vec<T>(limits_[k])) & less(key, Vec<T>(key_[k + 1])));
        return hit;
      });
      return;
    }
    // The lowest keys above ascending limits ascend: a pair that improves any limit improves the
    // last one below its key.
    const RowSearch<T> search(limits_, op_.limits.length);
    if (op_.limits.length <= SmallTable<T>::kSize) {
      // As they are now: `improve` looks again at what they no longer exclude.
      const SmallTable<T> lowest = sample(key_, op_.limits.length, 1);
      sweep(d, kinds, vecs, col_begin, [&](Vec<T> key) {
        return less(key, lowest.read(search.template count_below<false>(key), 0));
      });
      return;
    }
    sweep(d, kinds, vecs, col_begin, [&](Vec<T> key) {
      return less(key, search.template count_below<false>(key).read(key_));
    });
  }

 private:
  static constexpr int kLanes = Vec<T>::kLanes;
  // Up to here comparing with all limits beats a search.
  static constexpr int64_t kFewLimits = 8;

  static FLASHMETRIC_INLINE typename Vec<T>::M none() { return Vec<T>::mask(0); }

  template <class F>
  FLASHMETRIC_INLINE void sweep(const T* d, const Kinds<T>& kinds, int64_t vecs, int64_t col_begin,
                                const F& hits) {
    const Vec<T> sign(op_.farthest ? -1 : 1);
    for (int64_t v = 0; v < vecs; ++v) {
      const unsigned wanted = kinds.any(v);
      if (wanted == 0) continue;
      const Vec<T> key = sign * Vec<T>::load(d + v * kLanes);
      const unsigned bits = hits(key).bits() & wanted;
      if (__builtin_expect(bits != 0, 0)) improve(key, bits, col_begin + v * kLanes);
    }
  }

  // Lanes in ascending order, so that of equal keys the lowest index stays.
  void improve(Vec<T> keys, unsigned bits, int64_t col) {
    T lanes[kLanes];
    keys.store(lanes);
    for (; bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      const T key = lanes[lane];
      for (int64_t k = below(key); key < key_[k]; --k) {
        key_[k] = key;
        index_[k] = static_cast<int32_t>(col + lane);
      }
    }
  }

  // Number of limits below the key.
  int64_t below(T key) const {
    int64_t at = 0;
    for (int64_t step = op_.limits.length / 2; step > 0; step /= 2)
      at += limits_[at + step - 1] < key ? step : 0;
    return at;
  }

  const NearestBeyond<T>& op_;
  const T* limits_;
  T* key_;
  int32_t* index_;
};

template <class T>
void nearest_beyond(const PairBatch<T>& batch, const Block& block, const NearestBeyond<T>& op,
                    T* tile) {
  for_rows(batch, block, op.positives, tile,
           [&](int64_t i, const PairBlock<T>& pairs, const Kinds<T>& kinds) {
             BeyondRow<T>(op, i).run(pairs.line(i), kinds, pairs.vecs(), block.col_begin);
           });
}

template <class T>
void list_candidates(const PairBatch<T>& batch, const Block& block, const Candidates<T>& op,
                     T* tile) {
  constexpr int kLanes = Vec<T>::kLanes;
  const Vec<T> sign(op.farthest ? -1 : 1);
  for_rows(batch, block, op.positives, tile,
           [&](int64_t i, const PairBlock<T>& pairs, const Kinds<T>& kinds) {
             const int64_t row = i - op.row_begin;
             const Vec<T> bound(op.bound[row]);
             const T* d = pairs.line(i);
             T* key = op.key + row * op.capacity;
             int32_t* index = op.index + row * op.capacity;
             int64_t count = op.count[row];
             for (int64_t v = 0; v < pairs.vecs(); ++v) {
               const unsigned wanted = kinds.any(v);
               if (wanted == 0) continue;
               const Vec<T> keys = sign * Vec<T>::load(d + v * kLanes);
               unsigned bits = less(keys, bound).bits() & wanted;
               if (__builtin_expect(bits == 0, 1)) continue;
               T lanes[kLanes];
               keys.store(lanes);
               for (; bits != 0; bits &= bits - 1) {
                 const int lane = __builtin_ctz(bits);
                 key[count] = lanes[lane];
                 index[count++] = static_cast<int32_t>(block.col_begin + v * kLanes + lane);
               }
             }
             op.count[row] = count;
           });
}

}  // namespace FLASHMETRIC_ISA
}  // namespace flashmetric
