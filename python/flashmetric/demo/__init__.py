# SPDX-License-Identifier: Apache-2.0
"""The ``python -m flashmetric train`` job: an embedding of handwritten digits, start to finish."""
