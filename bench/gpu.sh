#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the library for this machine's GPU, tests it, watches it with compute-sanitizer, and
# measures it. Needs torch >= 2.11 with CUDA 13, nvcc, and no network.
#
#   bench/gpu.sh [OPTION...]
#
#   --quick            fewer cases, only tests with "cuda" in their names, shorter limits: 3 minutes
#                      instead of 9
#   --wheels DIR       install the wheels of DIR into build/gpu/site (peers, cmake, ninja, ...)
#   --out DIR          folder of the results, and of an archive of all logs; bench/results and no
#                      archive if not given
#   --skip-tests       do not run the test suite
#   --skip-sanitizer   do not run compute-sanitizer
#   --dry-run          no GPU: configure, call every op on the CPU, write a report of made-up figures
#                      into a temporary folder
#
#   PYTHON=python3             the Python that has torch
#   FLASHMETRIC_LIBRARY=FILE   a library that is already built; nothing is compiled then
#
# The exit status is 1 if a test failed, a contender of ours was wrong, or a sanitizer found
# something; 2 if it could not start.
set -euo pipefail
# Relative folders are those of the caller.
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
py=${PYTHON:-python3}
quick=0 dry=0 tests=1 sanitizer=1 wheels='' out=''

die() {
  printf 'gpu.sh: %s\n' "$*" >&2
  exit 2
}

usage() { sed -n '3,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]##*/}"; }

folder_of() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$caller" "$1" ;; esac }

while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    --skip-tests) tests=0 ;;
    --skip-sanitizer) sanitizer=0 ;;
    --wheels | --out)
      [ $# -ge 2 ] || die "$1 needs a folder"
      case $1 in --wheels) wheels=$(folder_of "$2") ;; *) out=$(folder_of "$2") ;; esac
      shift
      ;;
    -h | --help)
      (cd bench && usage)
      exit 0
      ;;
    *) die "unknown option $1; --help lists them" ;;
  esac
  shift
done
[ -z "$wheels" ] || [ -d "$wheels" ] || die "--wheels: no folder $wheels"
if [ "$dry" = 1 ]; then
  [ -z "$out" ] || die "--dry-run writes to a temporary folder of its own: leave --out away"
  out=$(mktemp -d "${TMPDIR:-/tmp}/flashmetric-dry-run-logs.XXXXXX")
  build=$out/build
else
  out=${out:-$root/bench/results}
  build=$root/build/gpu
fi
keep_logs=$([ "$out" = "$root/bench/results" ] || echo 1)
site=$build/site
logs=$build/logs
mkdir -p "$build" "$logs" "$out"
command -v "$py" >/dev/null || die "no Python called $py; set PYTHON"
py=$(command -v "$py")

# Seconds for all, and for each stage. A stage that ends early leaves its time to those after it.
if [ "$quick" = 1 ]; then
  total=175 build_limit=90 tests_limit=60 sanitizer_limit=40 bench_limit=55
else
  total=535 build_limit=180 tests_limit=210 sanitizer_limit=90 bench_limit=180
fi
summary=() failed=0

# shellcheck disable=SC2329  # called by the trap
save_logs() { tar -czf "$out/logs.tar.gz" -C "$build" logs 2>/dev/null || true; }
if [ -n "$keep_logs" ] && [ "$dry" = 0 ]; then trap save_logs EXIT; fi

stage() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

note() {
  summary+=("$*")
  printf '%s\n' "$*"
}

# limit OWN RESERVED: seconds for a stage that must leave RESERVED to those after it; at least 15.
limit() {
  local left=$((total - SECONDS - $2))
  [ "$left" -gt "$1" ] && left=$1
  [ "$left" -lt 15 ] && left=15
  printf '%d' "$left"
}

reserve() {
  local seconds=$bench_limit
  case $1 in tests) [ "$sanitizer" = 1 ] && seconds=$((seconds + sanitizer_limit)) ;; esac
  printf '%d' "$seconds"
}

# All wheels in one call: pip replaces whole folders of the target, such as bin/, from call to call.
unpack_wheels() {
  local files=() fitting=() file
  mapfile -t files < <(find "$wheels" -maxdepth 1 -name '*.whl' | sort)
  [ ${#files[@]} -gt 0 ] || die "--wheels: no *.whl in $wheels"
  rm -rf "$site"
  mkdir -p "$site"
  if ! "$py" -m pip --version >/dev/null 2>&1; then
    printf 'no pip: unpacking the wheels\n'
    for file in "${files[@]}"; do "$py" -m zipfile -e "$file" "$site"; done
    # An archive opened this way forgets which files are programs.
    find "$site" -type f \( -path '*/bin/*' -o -path '*.data/scripts/*' \) -exec chmod +x {} +
    return
  fi
  local pip=("$py" -m pip install -q --no-index --no-deps --disable-pip-version-check)
  pip+=(--root-user-action=ignore --target "$site")
  for file in "${files[@]}"; do # a wheel of another platform must not stop the others
    if "${pip[@]}" --dry-run "$file" >"$logs/pip.log" 2>&1; then
      fitting+=("$file")
    else
      note "wheel ${file##*/} left out: $(tail -n 1 "$logs/pip.log")"
    fi
  done
  [ ${#fitting[@]} -gt 0 ] || return 0
  "${pip[@]}" --no-compile "${fitting[@]}"
  printf 'installed %s\n' "${fitting[@]##*/}"
}

facts() {
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu \
      --format=csv || echo "nvidia-smi fails"
  else
    echo "no nvidia-smi"
  fi
  "$py" - <<'EOPY'
import platform
import torch
print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.1f} GiB")
else:
    print("this torch sees no CUDA device")
EOPY
  nproc | sed 's/$/ processors/'
}

# The compiler of a toolkit is often not on PATH.
find_nvcc() {
  if [ -n "${CUDACXX:-}" ]; then
    printf '%s' "$CUDACXX"
  elif command -v nvcc >/dev/null; then
    command -v nvcc
  elif [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    printf '%s' "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"
  fi
}

configure() { # ON|OFF, compute capabilities
  local generator='Unix Makefiles'
  if command -v ninja >/dev/null; then generator=Ninja; fi
  cmake -S . -B "$build" -G "$generator" -DCMAKE_BUILD_TYPE=Release -DFLASHMETRIC_CUDA="$1" \
    -DFLASHMETRIC_CUDA_ARCHS="$2" -DPython_EXECUTABLE="$py"
}

build_library() {
  command -v cmake >/dev/null ||
    die "no cmake: install it, or put its wheel (and that of ninja) into the folder of --wheels"
  local nvcc capability
  nvcc=$(find_nvcc)
  [ -n "$nvcc" ] || die "no nvcc: install the CUDA toolkit, or set CUDACXX to its nvcc"
  export CUDACXX=$nvcc
  "$nvcc" --version | tail -n 2
  capability=$("$py" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  local seconds
  seconds=$(limit "$build_limit" 0)
  export -f configure
  export build py
  timeout -k 10 "$seconds" bash -c "set -e; configure ON $capability && cmake --build \"\$build\" -j $(nproc)" \
    >"$logs/build.log" 2>&1 || {
    tail -n 40 "$logs/build.log"
    die "the build failed or took more than $seconds s, see $logs/build.log"
  }
  export FLASHMETRIC_LIBRARY=$build/libflashmetric_ops.so
}

# Plugins of other packages on the machine may warn, and a warning is an error here: only ours.
run_tests() {
  local seconds workers=4 plugins=() chosen=() name status=0
  seconds=$(limit "$tests_limit" "$(reserve tests)")
  if "$py" -c 'import _hypothesis_pytestplugin' 2>/dev/null; then
    plugins+=(-p _hypothesis_pytestplugin)
  fi
  if "$py" -c 'import xdist' 2>/dev/null; then
    [ "$(nproc)" -ge 8 ] || workers=2
    plugins+=(-p xdist.plugin -n "$workers")
  fi
  # Kernels that are interpreted or only compiled need no GPU: continuous integration does that.
  chosen=(--ignore-glob='*ptx_interpreter*')
  for name in tests/test_cuda_*.py; do
    if [ "$name" != tests/test_cuda_conformance.py ]; then chosen+=("--ignore=$name"); fi
  done
  if [ "$quick" = 1 ]; then chosen+=(-k cuda); fi
  # Interrupted, pytest still says what failed until then.
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout -s INT -k 15 "$seconds" "$py" -m pytest -q \
    --maxfail=20 -p no:cacheprovider "${plugins[@]}" "${chosen[@]}" >"$logs/tests.log" 2>&1 ||
    status=$?
  tail -n 40 "$logs/tests.log"
  case $status in
    0) note "tests: $(tail -n 1 "$logs/tests.log")" ;;
    124 | 137)
      # Unfinished is not passed.
      note "tests: NOT FINISHED within $seconds s, see $logs/tests.log"
      failed=1
      ;;
    *)
      note "tests: FAILED, $(tail -n 1 "$logs/tests.log")"
      failed=1
      ;;
  esac
}

find_sanitizer() {
  if command -v compute-sanitizer >/dev/null; then
    command -v compute-sanitizer
    return
  fi
  local nvcc
  nvcc=$(find_nvcc)
  # Folders that are not there are no error.
  find "$site" "${nvcc:+$(dirname "$nvcc")/..}" "${CUDA_HOME:-/usr/local/cuda}/" -maxdepth 4 \
    -name compute-sanitizer -type f -perm -u+x 2>/dev/null | head -n 1 || true
}

# One tool each in the background: most of their time is spent on the processor.
watch_with() { # sanitizer, tool, number, seconds
  local tool=$2 options=(--tool "$2" --error-exitcode 86 --print-limit 20)
  local program=("$py" -m bench.gpu.sanitize) status=0 help
  help=$("$1" --help 2>&1 || true)
  if [[ $help == *--port* ]]; then options+=(--port $((49152 + 100 * $3))); fi
  if [ "$tool" = memcheck ]; then
    # Errors of calls of the CUDA API are exceptions in Python; torch provokes some on purpose.
    options+=(--report-api-errors no)
  elif [[ $help == *--kernel-name* ]]; then
    # Kernels of other libraries read padding that nobody wrote, and share memory as they please.
    options+=(--kernel-name kns=flashmetric)
  elif [[ $help == *--filter* ]]; then
    options+=(--filter kns=flashmetric)
  fi
  # The slower tools take fewer shapes.
  if [ "$quick" = 1 ] || [ "$tool" != memcheck ]; then program+=(--quick); fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$4" "$1" "${options[@]}" "${program[@]}" \
    >"$logs/$tool.log" 2>&1 || status=$?
  printf '%d' "$status" >"$logs/$tool.status"
}

run_sanitizer() {
  local tool number=0 seconds sanitizer_path lines
  sanitizer_path=$(find_sanitizer)
  if [ -z "$sanitizer_path" ]; then
    note "compute-sanitizer: not found, skipped (toolkit, PATH, or the wheel nvidia-cuda-sanitizer-api)"
    return
  fi
  "$sanitizer_path" --version | tail -n 1
  seconds=$(limit "$sanitizer_limit" "$(reserve sanitizer)")
  for tool in memcheck racecheck initcheck synccheck; do
    watch_with "$sanitizer_path" "$tool" "$number" "$seconds" &
    number=$((number + 1))
  done
  wait
  for tool in memcheck racecheck initcheck synccheck; do
    lines=$(grep -E 'SUMMARY' "$logs/$tool.log" | tail -n 1 | sed 's/^=* *//' || true)
    case $(cat "$logs/$tool.status") in
      0) note "$tool: ${lines:-no summary, see $logs/$tool.log}" ;;
      124 | 137)
        if grep -qE 'Invalid __|Misaligned|Race reported|Uninitialized __|Barrier error' "$logs/$tool.log"; then
          note "$tool: FOUND SOMETHING before its time limit, see $logs/$tool.log"
          failed=1
        else
          note "$tool: not finished within $seconds s, nothing found until then"
        fi
        ;;
      *)
        if grep -qiE 'device not supported|unable to (start|launch|connect)|not supported on this' "$logs/$tool.log" &&
          ! grep -q '^sanitize: ' "$logs/$tool.log"; then
          note "$tool: does not run on this machine: $(grep -iE 'not supported|unable to' "$logs/$tool.log" | head -n 1)"
        else
          note "$tool: FOUND SOMETHING, ${lines:-see $logs/$tool.log}"
          head -n 60 "$logs/$tool.log"
          failed=1
        fi
        ;;
    esac
  done
}

run_bench() {
  local seconds options=(--out "$out") status=0
  seconds=$(limit "$bench_limit" 0)
  [ "$quick" = 1 ] && options+=(--quick)
  options+=(--seconds $((seconds > 30 ? seconds - 12 : seconds)))
  timeout -k 20 $((seconds + 10)) "$py" -m bench.gpu "${options[@]}" \
    >"$logs/bench.txt" 2>"$logs/bench.log" || status=$?
  grep -E '^(machine:|gate .*failed|wrote )' "$logs/bench.log" || true
  cat "$logs/bench.txt"
  case $status in
    0) note "benchmark: done, results in $out" ;;
    1) note "benchmark: OUR RESULTS WERE WRONG OR AN OP FAILED, see the faults in the report and $logs/bench.log" ;;
    124 | 137) note "benchmark: NOT FINISHED, cut off after $((seconds + 10)) s, see $logs/bench.log" ;;
    *) note "benchmark: FAILED with status $status, see $logs/bench.log" ;;
  esac
  if [ "$status" != 0 ]; then
    tail -n 15 "$logs/bench.log"
    failed=1
  fi
}

finish() {
  stage "summary"
  printf '%s\n' "${summary[@]}"
  printf '%d s in all\n' "$SECONDS"
  exit "$failed"
}

export PYTHONPATH=$root/python FLASHMETRIC_REQUIRE_NATIVE=1 PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  stage "wheels"
  unpack_wheels
fi
if [ -d "$site" ]; then
  export PYTHONPATH=$PYTHONPATH:$site
  for folder in "$site"/bin "$site"/cmake/data/bin "$site"/*.data/scripts; do
    [ ! -d "$folder" ] || PATH=$folder:$PATH
  done
fi

stage "machine"
facts

if [ "$dry" = 1 ]; then
  # Not this process's business whether a library is there: without one PyTorch code runs the ops.
  [ -n "${FLASHMETRIC_LIBRARY:-}" ] || unset FLASHMETRIC_REQUIRE_NATIVE
  stage "DRY RUN: configure"
  if command -v cmake >/dev/null; then
    nvcc=$(find_nvcc)
    cuda=OFF
    if [ -n "$nvcc" ]; then cuda=ON && export CUDACXX=$nvcc; fi
    configure "$cuda" 90 >"$logs/configure.log" 2>&1 || {
      tail -n 30 "$logs/configure.log"
      die "cmake does not configure, see $logs/configure.log"
    }
    note "configure: ok, $(tail -n 30 "$logs/configure.log" | grep -E '^-- flashmetric:' | cut -c4-)"
  else
    note "configure: not tried, there is no cmake"
  fi
  stage "DRY RUN: every op on the CPU"
  "$py" -m bench.gpu.sanitize --device cpu --quick --engines "" || failed=1
  sanitizer_path=$(find_sanitizer)
  note "compute-sanitizer: ${sanitizer_path:-not found}"
  stage "DRY RUN: benchmark"
  options=(--dry-run)
  [ "$quick" = 1 ] && options+=(--quick)
  "$py" -m bench.gpu "${options[@]}" 2>"$logs/bench.log" || failed=1
  grep -E '^wrote ' "$logs/bench.log" || tail -n 20 "$logs/bench.log"
  note "DRY RUN: nothing was measured"
  finish
fi

"$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  die "this torch sees no CUDA device; --dry-run checks everything else"
if [ -n "${FLASHMETRIC_LIBRARY:-}" ]; then
  FLASHMETRIC_LIBRARY=$(folder_of "$FLASHMETRIC_LIBRARY")
  [ -f "$FLASHMETRIC_LIBRARY" ] || die "FLASHMETRIC_LIBRARY: no file $FLASHMETRIC_LIBRARY"
  export FLASHMETRIC_LIBRARY
  note "build: skipped, FLASHMETRIC_LIBRARY is set"
else
  stage "build"
  build_library
  note "build: ok"
fi
"$py" -m flashmetric info
if [ "$tests" = 1 ]; then
  stage "tests"
  run_tests
fi
if [ "$sanitizer" = 1 ]; then
  stage "compute-sanitizer"
  run_sanitizer
fi
stage "benchmark"
run_bench
finish
