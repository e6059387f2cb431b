// SPDX-License-Identifier: Apache-2.0
// What the CUDA ops share on the host: stream, device facts, scratch memory, launch errors.
#pragma once

#include <batch.h>
#include <cuda_runtime_api.h>
#include <flashmetric/cuda_kernels.h>
#include <layout.h>
#include <plan.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>

namespace flashmetric::cuda {

// Which implementation serves an op: FLASHMETRIC_CUDA_ENGINE = auto (default), tile or slab, read
// at every call.
enum class Engine { kAuto, kTile, kSlab };
Engine engine();

// The stream that torch works on now, on the device of `tensor`.
cudaStream_t current_stream(const Tensor& tensor);

// Of the device of `tensor`, which is the current one; asked once per device.
const DeviceLimits& device_limits(const Tensor& tensor);

// Throws if a launch failed.
void check_launch(cudaError_t error, const char* op);

// The dtype of rows for the kernels.
Scalar scalar_of(const Tensor& rows);

// Kernels follow bare pointers: one into another memory would end the process.
void check_device(const Tensor& tensor, const Tensor& query, const char* name);
// The same for a whole batch.
void check_devices(const Tensor& query, const Tensor& query_labels, const OptionalTensor& ref,
                   const OptionalTensor& ref_labels);

inline ScalarType accumulate_type(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline Tensor in_type(const Tensor& tensor, ScalarType type) {
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Scratch memory of one op, in one allocation: take() all parts, allocate(), then get() them.
class Workspace {
 public:
  // Bytes of `count` elements; returns the part's offset.
  template <class T>
  int64_t take(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ = round_up(bytes_ + count * static_cast<int64_t>(sizeof(T)), 256);
    return offset;
  }
  void allocate(const Tensor& like) {
    tensor_ = torch::stable::new_empty(like, {bytes_}, torch::headeronly::ScalarType::Byte);
    base_ = static_cast<char*>(tensor_.mutable_data_ptr());
  }
  template <class T>
  T* get(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  char* base_ = nullptr;
  Tensor tensor_;
};

}  // namespace flashmetric::cuda
