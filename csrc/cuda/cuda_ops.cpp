// SPDX-License-Identifier: Apache-2.0
#include <cuda_ops.h>
#include <flashmetric/cuda_status.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstdlib>
#include <mutex>

// libtorch_cuda.so has this function, a CPU-only torch does not: a weak reference lets one binary
// load in both. Only code that was handed a CUDA tensor calls it, and then it is there.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashmetric::cuda {

Engine engine() {
  const char* name = std::getenv("FLASHMETRIC_CUDA_ENGINE");
  const std::string value = name == nullptr ? "auto" : name;
  if (value == "auto") return Engine::kAuto;
  if (value == "tile") return Engine::kTile;
  if (value == "slab") return Engine::kSlab;
  STD_TORCH_CHECK(false, "FLASHMETRIC_CUDA_ENGINE: auto, tile or slab expected, got '", value, "'");
}

cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(shims_bound(), "flashmetric: this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

Scalar scalar_of(const Tensor& rows) {
  switch (rows.scalar_type()) {
    case ScalarType::Half:
      return Scalar::kHalf;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    case ScalarType::Float:
      return Scalar::kFloat;
    case ScalarType::Double:
      return Scalar::kDouble;
    default:
      STD_TORCH_CHECK(false, "query: a float64, float32, float16 or bfloat16 tensor expected");
  }
}

void check_device(const Tensor& tensor, const Tensor& query, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == query.get_device_index(), name,
                  ": the device of query expected");
}

void check_devices(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                   const OptionalTensor& ref_labels) {
  check_device(query_labels, query, "query_labels");
  if (!ref.has_value()) return;
  check_device(*ref, query, "ref");
  check_device(*ref_labels, query, "ref_labels");
}

const DeviceLimits& device_limits(const Tensor& tensor) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<std::once_flag, kMaxDevices> asked;
  const int device = tensor.get_device_index();
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device: number ", device,
                  " is beyond the supported ", kMaxDevices);
  std::call_once(asked[device], [&] {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check_launch(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    int arch = 0;
    const cudaError_t error = compiled_arch(&arch);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "flashmetric was not built for GPUs of compute capability ",
                    attribute(cudaDevAttrComputeCapabilityMajor), ".",
                    attribute(cudaDevAttrComputeCapabilityMinor),
                    ": build it with FLASHMETRIC_CUDA_ARCHS (", cudaGetErrorString(error), ")");
    limits[device] = {arch, attribute(cudaDevAttrMultiProcessorCount),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
  return limits[device];
}

int64_t device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // the error is sticky: a later launch check would report it again
    return 0;
  }
  return count;
}

std::string status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

bool shims_bound() { return aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace flashmetric::cuda
