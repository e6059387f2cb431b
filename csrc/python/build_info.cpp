// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m, py::mod_gil_not_used()) {
  m.doc() = "How the native library beside this module was built.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = FLASHMETRIC_VERSION;
    info["torch_version"] = FLASHMETRIC_TORCH_VERSION;
    info["torch_target"] = FLASHMETRIC_TORCH_TARGET;
    info["compiler"] = FLASHMETRIC_COMPILER;
    info["build_type"] = FLASHMETRIC_BUILD_TYPE;
    info["cuda_version"] = FLASHMETRIC_CUDA_VERSION;
    info["cuda_archs"] = FLASHMETRIC_CUDA_ARCHS;
    return info;
  });
}
