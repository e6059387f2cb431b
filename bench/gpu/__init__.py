# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the CUDA ops: ``python -m bench.gpu``; ``bench/gpu.sh`` builds and tests first."""
