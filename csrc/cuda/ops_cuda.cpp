// SPDX-License-Identifier: Apache-2.0
// The ops' CUDA implementations: host code on the stable ABI that launches the kernels of *.cu.
#include <flashmetric/cuda_kernels.h>
#include <flashmetric/cuda_status.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// libtorch_cuda.so has this function, a CPU-only torch does not: a weak reference lets one binary
// load in both. Only code that was handed a CUDA tensor calls it, and then it is there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashmetric {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(cuda::shims_bound(), "flashmetric: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

template <typename Scalar>
Tensor launch_row_sqnorm(const Tensor& x) {
  using Acc = cuda::accumulate_t<Scalar>;
  constexpr ScalarType kAcc = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor rows = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0)}, kAcc);
  const cudaError_t error = cuda::row_sqnorm(static_cast<const Scalar*>(rows.const_data_ptr()),
                                             static_cast<Acc*>(out.mutable_data_ptr()),
                                             rows.size(0), rows.size(1), current_stream(rows));
  check_launch(error, "_row_sqnorm");
  return out;
}

Tensor row_sqnorm(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "_row_sqnorm: x must have 2 dimensions, got ", x.dim());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return launch_row_sqnorm<__half>(x);
    case ScalarType::BFloat16:
      return launch_row_sqnorm<__nv_bfloat16>(x);
    case ScalarType::Float:
      return launch_row_sqnorm<float>(x);
    case ScalarType::Double:
      return launch_row_sqnorm<double>(x);
    default:
      STD_TORCH_CHECK(false, "_row_sqnorm: x must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace

int64_t cuda::device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // the error is sticky: a later launch check would report it again
    return 0;
  }
  return count;
}

std::string cuda::status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

bool cuda::shims_bound() { return aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace flashmetric

STABLE_TORCH_LIBRARY_IMPL(flashmetric, CUDA, m) {
  m.impl("_row_sqnorm", TORCH_BOX(&flashmetric::row_sqnorm));
}
