// SPDX-License-Identifier: Apache-2.0
// Private ops that say what the loaded library chose and found; see describe() in _library.py.
#include <flashmetric/kernels.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#ifdef FLASHMETRIC_WITH_CUDA
#include <flashmetric/cuda_status.h>
#endif

namespace flashmetric {
namespace {

std::string cpu_isa() { return cpu_kernels<float>().isa; }

int64_t num_threads() { return torch::stable::get_num_threads(); }

#ifndef FLASHMETRIC_WITH_CUDA
namespace cuda {
int64_t device_count() { return 0; }
std::string status() { return "built without CUDA"; }
bool shims_bound() { return false; }
}  // namespace cuda
#endif

}  // namespace
}  // namespace flashmetric

STABLE_TORCH_LIBRARY_FRAGMENT(flashmetric, m) {
  m.def("_cpu_isa() -> str");
  m.def("_num_threads() -> int");
  m.def("_cuda_device_count() -> int");
  m.def("_cuda_status() -> str");
  m.def("_cuda_shims_bound() -> bool");
}

// Ops without a tensor argument have no device to dispatch on; this key serves them all.
STABLE_TORCH_LIBRARY_IMPL(flashmetric, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&flashmetric::cpu_isa));
  m.impl("_num_threads", TORCH_BOX(&flashmetric::num_threads));
  m.impl("_cuda_device_count", TORCH_BOX(&flashmetric::cuda::device_count));
  m.impl("_cuda_status", TORCH_BOX(&flashmetric::cuda::status));
  m.impl("_cuda_shims_bound", TORCH_BOX(&flashmetric::cuda::shims_bound));
}
