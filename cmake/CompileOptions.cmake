# SPDX-License-Identifier: Apache-2.0
# flashmetric_compile_options(<target>): warnings and sanitizers for our own sources. torch's,
# pybind11's and CUDA's headers come from imported targets, which CMake marks as system headers.
function(flashmetric_compile_options target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(FLASHMETRIC_WERROR)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror>
      $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings -Xcompiler=-Werror>)
  endif()
  if(FLASHMETRIC_SANITIZE)
    # Without recovery UBSan stops at the first finding; otherwise it prints and the tests stay green.
    set(_flags -fsanitize=${FLASHMETRIC_SANITIZE} -fno-sanitize-recover=all)
    # The checks take GCC's flow analysis in: it then reports uninitialised variables that are not.
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:${_flags} -fno-omit-frame-pointer -g1 -Wno-maybe-uninitialized>)
    target_link_options(${target} PRIVATE ${_flags})
  endif()
endfunction()
