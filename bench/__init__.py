# SPDX-License-Identifier: Apache-2.0
"""Benchmark of the fused losses against what people use today: ``python -m bench``."""
