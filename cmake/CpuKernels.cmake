# SPDX-License-Identifier: Apache-2.0
# flashmetric_add_isa_kernels(<target> <source>...): compiles the sources once per instruction set,
# each time into the namespace FLASHMETRIC_ISA; csrc/cpu/dispatch.cpp chooses at run time.
function(flashmetric_add_isa_kernels target)
  set(_isas generic)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND _isas avx2 avx512)
    target_compile_definitions(${target} PRIVATE FLASHMETRIC_HAVE_AVX2=1 FLASHMETRIC_HAVE_AVX512=1)
  endif()
  set(_flags_generic "")
  set(_flags_avx2 -mavx2 -mfma)
  # GCC prefers 256-bit vectors on AVX-512 machines unless told otherwise.
  set(_flags_avx512 ${_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12's own AVX-512 header initialises variables with themselves and is then warned about:
    # https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
    list(APPEND _flags_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  set(_optimize -O3)
  if(FLASHMETRIC_SANITIZE)
    # The compiler takes minutes per file to optimise the checks further.
    set(_optimize -O1)
  endif()
  foreach(isa IN LISTS _isas)
    set(_objects ${target}_${isa})
    add_library(${_objects} OBJECT ${ARGN})
    target_include_directories(${_objects} PRIVATE csrc/include csrc/cpu)
    target_compile_definitions(${_objects} PRIVATE FLASHMETRIC_ISA=${isa})
    flashmetric_compile_options(${_objects})
    target_compile_options(${_objects} PRIVATE ${_optimize} -ffp-contract=fast ${_flags_${isa}})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${_objects}>)
  endforeach()
endfunction()
