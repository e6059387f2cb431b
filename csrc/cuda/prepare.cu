// SPDX-License-Identifier: Apache-2.0
// prepare: rows -> prescaled half-precision planes, norms, labels; and the initial state of the
// kernels that follow. One warp a row.
//
// Each row is multiplied by a power of two that brings its largest element near the top of
// half-precision's range, and split as x = high + low. The products high.high + high.low + low.high
// then carry 22 bits of x with one float accumulator. The norm is that of the operands that the
// products see, so that u of near-duplicates does not suffer from their rounding.
#include <exact.cuh>

namespace flashmetric::cuda {
namespace {

struct Row {
  const void* data;  // the whole tensor
  int64_t index;
  bool padding;
  int64_t label;
};

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, mask));
  return value;
}

// Writes one row; returns whether its squared distances can overflow or are not numbers.
template <class S>
__device__ bool prepare_row(const PrepareArgs& args, const TileRows& out, const Row& row, S,
                            int lane) {
  const int64_t d = args.problem.d, width = int64_t{args.problem.chunks} * kChunk;
  const S* x = static_cast<const S*>(row.data) + row.index * d;
  __half* high = out.planes + row.index * width;
  __half* low = high + out.plane_stride;

  float largest = 0.0f, norm = 0.0f;
  if (!row.padding) {
    for (int64_t k = lane; k < d; k += kWarp) largest = fmaxf(largest, fabsf(float(x[k])));
    largest = warp_max(largest);
  }
  const int exponent = prescale_exponent(__float_as_uint(largest));
  const float factor = __uint_as_float(power_of_two_bits(exponent));
  const float back = __uint_as_float(power_of_two_bits(-exponent));
  for (int64_t k = lane; k < width; k += kWarp) {
    const bool inside = !row.padding && k < d;
    const float value = inside ? float(x[k]) * factor : 0.0f;
    const __half rounded = __float2half_rn(value);
    high[k] = rounded;
    float seen = __half2float(rounded);
    if (args.planes == 2) {
      const __half rest = __float2half_rn(value - seen);
      low[k] = rest;
      seen += __half2float(rest);
    }
    seen *= back;
    norm += seen * seen;
  }
  norm = warp_sum(norm);

  const Distance distance = args.problem.distance;
  // Of a unit row that is not to have length zero: the norm of a short row can underflow.
  const bool zero = (has_unit_rows(distance) ? norm : largest) == 0.0f;
  float bias = is_difference(distance) ? norm : 0.0f;
  // A zero row is at u = 2 from every unit row: u = 1 + 1 - 0.
  if (has_unit_rows(distance) && zero) bias = 1.0f;
  if (row.padding) bias = not_a_number<float>();
  if (lane == 0) out.meta[row.index] = RowMeta{bias, zero ? 0.0f : back, row.label};
  // A squared distance is at most four times the larger squared norm. fmaxf above lets NaN pass,
  // but its square is in the norm: half precision has NaN and infinity, too.
  return !isfinite(4.0f * norm);
}

__global__ void __launch_bounds__(kRowWarps* kWarp, 8) prepare_kernel(const PrepareArgs args) {
  const PairProblem& problem = args.problem;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  const int64_t warps = int64_t{gridDim.x} * kRowWarps;
  const int64_t x_rows = round_up(problem.query.n, kRowPadding);
  const int64_t rows = x_rows + (problem.self ? 0 : round_up(problem.ref.n, kRowPadding));

  bool bad = false;
  for (int64_t i = warp; i < rows; i += warps) {
    const bool of_query = i < x_rows;
    const RawRows& raw = of_query ? problem.query : problem.ref;
    const TileRows& out = of_query ? problem.x : problem.r;
    const int64_t index = of_query ? i : i - x_rows;
    const bool padding = index >= raw.n;
    // Padding is in no pair.
    const int64_t label = padding ? kIgnoredLabel : raw.labels[index * problem.labelling.words];
    const Row row{raw.data, index, padding, label};
    with_scalar(problem.scalar,
                [&](auto type) { bad = prepare_row(args, out, row, type, lane) || bad; });
    if (of_query && args.keys != nullptr && lane < 2) args.keys[lane * x_rows + index] = kNoKey;
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    args.bad[blockIdx.x] = bad;
    if (blockIdx.x == 0 && args.counter != nullptr) *args.counter = 0;
  }
}

}  // namespace

cudaError_t prepare(const PrepareArgs& args, int grid, cudaStream_t stream) {
  prepare_kernel<<<static_cast<unsigned>(grid), kRowWarps * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t compiled_arch(int* arch) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, prepare_kernel);
  // The virtual architecture is what __CUDA_ARCH__ was, also where a machine code was made of it.
  *arch = attributes.ptxVersion;
  return error;
}

}  // namespace flashmetric::cuda
