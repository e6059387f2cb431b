#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment ready: torch, build tools, this package in editable mode. Prints the
# environment's python on stdout, everything else on stderr. Cheap to run again: it installs what is
# missing and builds what changed.
#
#   scripts/bootstrap.sh [GROUP...]   with the packages of these groups of pyproject.toml too
#
#   PYTHON=python3         the Python to start from; a torch that it has is used
#   VENV=.venv             where the environment is
#   TORCH_SPEC=torch==...  what to install where PYTHON has no torch
#   PIP_NO_INDEX=1         offline: packages of GROUP that are missing are only reported
#   FLASHMETRIC_CUDA, FLASHMETRIC_CUDA_ARCHS, FLASHMETRIC_WERROR: see CMakeLists.txt and cmake/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=${PYTHON:-python3}
venv=${VENV:-.venv}
torch_spec=${TORCH_SPEC:-torch==2.13.0}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '[bootstrap] %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

if [ ! -x "$venv/bin/python" ]; then
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python 3.10 or newer is needed, $base is $("$base" -V 2>&1); set PYTHON to another one"
  say "creating $venv"
  "$base" -m venv "$venv"
  # A virtual environment does not see packages of another one, and system-site-packages would not
  # change that where $base is itself in an environment. A .pth file works for both.
  "$base" - <<'EOPY' >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_torch.pth"
import importlib.util, sys
if importlib.util.find_spec("torch"):
    print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")
EOPY
fi
bin=$(cd "$venv/bin" && pwd)
py=$bin/python
export PATH="$bin:$PATH"

# Prints those requirements of the named groups that the environment does not meet.
unmet() {
  "$py" - "$@" <<'EOPY'
import re, shutil, subprocess, sys
from importlib.metadata import PackageNotFoundError, version

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    config = tomllib.load(file)
project = config["project"]
groups = {
    **project["optional-dependencies"],
    **config["dependency-groups"],
    "run": project["dependencies"],
    "build": [*config["build-system"]["requires"], "ninja"],
}


def expand(group):
    if group not in groups:
        sys.exit(f"[bootstrap] no group {group!r} in pyproject.toml; there are: {', '.join(groups)}")
    for requirement in map(Requirement, groups[group]):
        if requirement.name == project["name"]:
            for extra in sorted(requirement.extras):
                yield from expand(extra)
        else:
            yield requirement


def met(requirement):
    if requirement.name == "ninja" and shutil.which("ninja"):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def cmake_met(wanted):
    if not shutil.which("cmake"):
        return False
    banner = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", banner)
    return found is not None and SpecifierSet(wanted).contains(found[0])


for requirement in dict.fromkeys(r for group in sys.argv[1:] for r in expand(group)):
    if not met(requirement):
        print(requirement)
if "build" in sys.argv:
    wanted = config["tool"]["scikit-build"]["cmake"]["version"]
    if not cmake_met(wanted):
        print(f"cmake{wanted}")
EOPY
}

torch_version() {
  "$py" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

if ! torch=$(torch_version); then
  say "installing $torch_spec"
  # Compiling all of torch's modules takes longer than unpacking them.
  "$py" -m pip install -q --no-compile "$torch_spec" >&2
  torch=$(torch_version)
fi

# Nothing that is installed later may replace torch.
install() { "$py" -m pip install -q "torch==$torch" "$@" >&2; }

missing=$(unmet run build)
if [ -n "$missing" ]; then
  mapfile -t packages <<<"$missing"
  say "installing ${packages[*]}"
  install "${packages[@]}"
fi
missing=$([ $# -eq 0 ] || unmet "$@")
if [ -n "$missing" ]; then
  mapfile -t packages <<<"$missing"
  if [ -z "${PIP_NO_INDEX:-}" ]; then
    say "installing ${packages[*]}"
    install "${packages[@]}"
  else
    for package in "${packages[@]}"; do
      install "$package" 2>/dev/null || say "offline, going on without $package"
    done
  fi
fi

# The stamp holds what the build depends on besides the files that `find` compares with it.
stamp=$venv/.flashmetric-stamp
settings="torch $torch, CUDA ${FLASHMETRIC_CUDA:-} ${FLASHMETRIC_CUDA_ARCHS:-} ${CUDACXX:-}, \
werror ${FLASHMETRIC_WERROR:-}, modules $(find python -name '*.py*' -type f ! -name '*.pyc' | LC_ALL=C sort | cksum)"
built() {
  compgen -G "$venv/lib/python*/site-packages/flashmetric/libflashmetric_ops.so" >/dev/null
}
if ! built || [ "$(cat "$stamp" 2>/dev/null)" != "$settings" ] ||
  [ -n "$(find csrc cmake CMakeLists.txt pyproject.toml -newer "$stamp" -print -quit)" ]; then
  say "building the native library"
  rm -f "$stamp"
  marker=$(mktemp "$venv/.stamp.XXXXXX") # older than any source edited while the build runs
  # The build tree is part of the environment: another environment may hold another torch.
  "$py" -m pip install -q --no-deps --no-build-isolation \
    --config-settings="build-dir=$(cd "$venv" && pwd)/build" -e . >&2
  built || die "the build went through, but left no libflashmetric_ops.so"
  printf '%s\n' "$settings" >"$stamp"
  touch -r "$marker" "$stamp"
  rm "$marker"
fi
echo "$py"
