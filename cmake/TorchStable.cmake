# SPDX-License-Identifier: Apache-2.0
# Makes the imported target torch_stable from the torch of the build's Python.
#
# Not find_package(Torch): with a CUDA build of torch it demands a complete CUDA toolkit and
# rewrites the CUDA flags. The stable ABI needs only torch's headers and libtorch.so, and torch
# itself is located without importing it, so its dependencies may be absent at build time.
set(FLASHMETRIC_TORCH_TARGET "2.11" CACHE STRING "Oldest torch that the library must load in")

string(CONCAT _probe
  "import importlib.metadata as m, importlib.util as u, pathlib as p; "
  "print(p.Path(u.find_spec('torch').origin).parent); print(m.version('torch'))")
# pip's build isolation hides installed packages through PYTHONPATH, which -I ignores: the second
# attempt then sees the torch of the environment that pip installs into.
foreach(_flags "" "-I")
  execute_process(COMMAND "${Python_EXECUTABLE}" ${_flags} -c "${_probe}"
    OUTPUT_VARIABLE _found OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE _error RESULT_VARIABLE _status)
  if(_status EQUAL 0)
    break()
  endif()
endforeach()
if(NOT _status EQUAL 0)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no torch. Install torch first, then build with "
    "`pip install --no-build-isolation .` (or `python -m build --no-isolation`).\n${_error}")
endif()
string(REPLACE "\n" ";" _found "${_found}")
list(GET _found 0 _torch_dir)
list(GET _found 1 FLASHMETRIC_TORCH_VERSION)
if(FLASHMETRIC_TORCH_VERSION VERSION_LESS FLASHMETRIC_TORCH_TARGET)
  message(FATAL_ERROR "torch ${FLASHMETRIC_TORCH_VERSION} is too old: flashmetric needs torch >= "
    "${FLASHMETRIC_TORCH_TARGET}")
endif()

string(REGEX MATCH "^([0-9]+)\\.([0-9]+)" _ "${FLASHMETRIC_TORCH_TARGET}")
math(EXPR _target "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable SHARED IMPORTED)
set_target_properties(torch_stable PROPERTIES
  IMPORTED_LOCATION "${_torch_dir}/lib/libtorch.so"
  IMPORTED_SONAME "libtorch.so"
  INTERFACE_INCLUDE_DIRECTORIES "${_torch_dir}/include"
  INTERFACE_COMPILE_DEFINITIONS "TORCH_TARGET_VERSION=${_target}ULL"
  # libtorch.so must stay in DT_NEEDED though nothing binds to it directly: it brings libtorch_cpu
  # and, in CUDA builds of torch, libtorch_cuda into the scope our symbols are looked up in.
  INTERFACE_LINK_OPTIONS "LINKER:--no-as-needed")
