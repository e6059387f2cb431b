# SPDX-License-Identifier: Apache-2.0
"""Training loops of other libraries before and after the one-line change, and where it pays."""

# What the command line offers; importing more than names would load the library, of which the
# processes of the other benchmarks set the environment first.
PARTS = ("pml", "sentence-transformers", "memory", "chunks", "dense")
