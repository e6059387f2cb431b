#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs tests on an op library built with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   scripts/asan.sh PYTHON [PYTEST_ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
py=$1
shift
build=$PWD/build/asan
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$py" -DFLASHMETRIC_CUDA=OFF \
  -DFLASHMETRIC_SANITIZE=address,undefined >/dev/null
cmake --build "$build" >&2

# Python itself is not instrumented, so the runtimes must come first in the process. libstdc++ too:
# loaded later, its exceptions would pass AddressSanitizer by.
preload=
for library in libasan.so libubsan.so libstdc++.so.6; do
  preload+="$(realpath "$("${CXX:-g++}" -print-file-name="$library")") "
done
# Leaks are not looked for: CPython and torch keep memory until the process ends. A finding ends the
# process, so pytest must not hold back what was written to stderr.
env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  FLASHMETRIC_LIBRARY="$build/libflashmetric_ops.so" FLASHMETRIC_REQUIRE_NATIVE=1 \
  "$py" -m pytest -q --capture=sys -p no:cacheprovider "$@"
