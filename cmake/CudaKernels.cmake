# SPDX-License-Identifier: Apache-2.0
# Optional CUDA. Sets FLASHMETRIC_WITH_CUDA, FLASHMETRIC_ARCH_LIST (such as 80;90) and
# FLASHMETRIC_PORTABLE_ARCHS, and defines flashmetric_add_cuda_kernels().
set(FLASHMETRIC_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO (when nvcc is found), ON or OFF")
set(FLASHMETRIC_CUDA_ARCHS "AUTO" CACHE STRING
  "Compute capabilities such as 80,90; AUTO: this machine's GPUs, or all for wheels and without a GPU")

set(FLASHMETRIC_WITH_CUDA OFF)
if(NOT FLASHMETRIC_CUDA STREQUAL "OFF")
  # The toolkit's default location is often not on PATH.
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX}
     AND EXISTS /usr/local/cuda/bin/nvcc)
    set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(FLASHMETRIC_WITH_CUDA ON)
  elseif(NOT FLASHMETRIC_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "FLASHMETRIC_CUDA=${FLASHMETRIC_CUDA}, but no CUDA compiler was found: "
      "put nvcc on PATH or set CUDACXX")
  endif()
endif()

if(FLASHMETRIC_WITH_CUDA)
  set(FLASHMETRIC_ARCH_LIST 75 80 86 89 90 100 120)
  if(NOT FLASHMETRIC_CUDA_ARCHS STREQUAL "AUTO")
    string(REPLACE "," ";" FLASHMETRIC_ARCH_LIST "${FLASHMETRIC_CUDA_ARCHS}")
  elseif(NOT SKBUILD_STATE STREQUAL "wheel")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE _caps OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE _status)
    if(_status EQUAL 0 AND _caps MATCHES "^[0-9]+\\.[0-9]+")
      string(REGEX REPLACE "[^0-9\n]" "" _caps "${_caps}")
      string(REPLACE "\n" ";" FLASHMETRIC_ARCH_LIST "${_caps}")
      list(REMOVE_DUPLICATES FLASHMETRIC_ARCH_LIST)
    endif()
  endif()

  # PTX of one old architecture is the way onto chips that are not listed: the driver compiles it.
  list(GET FLASHMETRIC_ARCH_LIST 0 _ptx)
  if(80 IN_LIST FLASHMETRIC_ARCH_LIST)
    set(_ptx 80)
  endif()
  list(TRANSFORM FLASHMETRIC_ARCH_LIST APPEND "-real" OUTPUT_VARIABLE FLASHMETRIC_PORTABLE_ARCHS)
  list(APPEND FLASHMETRIC_PORTABLE_ARCHS "${_ptx}-virtual")

  set(CMAKE_CUDA_ARCHITECTURES ${FLASHMETRIC_PORTABLE_ARCHS})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endif()

# flashmetric_add_cuda_kernels(<target> <family> [NEEDS <cc>] ARCHS <arch>... SOURCES <file>...)
# Compiles the sources for those architectures and defines FLASHMETRIC_CUDA_<FAMILY>=1 on the
# target. Does nothing when NEEDS (such as 90) is not among the architectures of this build.
function(flashmetric_add_cuda_kernels target family)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "NEEDS" "ARCHS;SOURCES")
  if(arg_NEEDS AND NOT arg_NEEDS IN_LIST FLASHMETRIC_ARCH_LIST)
    return()
  endif()
  set(_objects ${target}_cuda_${family})
  add_library(${_objects} OBJECT ${arg_SOURCES})
  set_target_properties(${_objects} PROPERTIES CUDA_ARCHITECTURES "${arg_ARCHS}")
  target_include_directories(${_objects} PRIVATE csrc/include csrc/cuda)
  # Spills are warnings, and errors with FLASHMETRIC_WERROR.
  target_compile_options(${_objects} PRIVATE -Xptxas=-warn-spills,-warn-lmem-usage)
  # Line tables quadruple the object files, so only profiling builds carry them.
  target_compile_options(${_objects} PRIVATE --expt-relaxed-constexpr -Xfatbin=-compress-all
    $<$<CONFIG:RelWithDebInfo>:-lineinfo>)
  flashmetric_compile_options(${_objects})
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${_objects}>)
  string(TOUPPER ${family} _family)
  target_compile_definitions(${target} PRIVATE FLASHMETRIC_CUDA_${_family}=1)
endfunction()
