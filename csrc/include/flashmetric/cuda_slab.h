// SPDX-License-Identifier: Apache-2.0
// The slab engine: the matrix of inner products in slabs of rows that fit the second-level cache,
// by ordinary matrix products, each followed by a kernel that uses it up. It serves float64 and
// what the tile engine cannot, and it is a second opinion on the same device. Arguments, results
// and rules are those of the ops of the same name, which have called check_batch. No call waits for
// the device.
#pragma once

#include <batch.h>

#include <tuple>

namespace flashmetric::cuda {

// What multiplies. kLibrary: torch's product, under its switch for TF32 and its rules for
// deterministic mode, except float64. kPlain: the kernel of slab_product.cu.
enum class Multiply { kLibrary, kPlain };

// Index [2, n] and distance [2, n]. `exact` measures every pair by exact differences.
std::tuple<Tensor, Tensor> slab_hardest(const Tensor& query, const Tensor& query_labels,
                                        const OptionalTensor& ref, const OptionalTensor& ref_labels,
                                        Distance distance, bool exact,
                                        Multiply multiply = Multiply::kLibrary);

// Loss (0-d), slope [2, n] and scale (0-d) of what slab_hardest found.
std::tuple<Tensor, Tensor, Tensor> triplet_finish(const Tensor& index, const Tensor& distance,
                                                  const TripletRule<double>& rule);

}  // namespace flashmetric::cuda
