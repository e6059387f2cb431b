# SPDX-License-Identifier: Apache-2.0
"""The table of all losses, from which docs/losses.md is generated."""

from flashmetric.catalog import pairwise, softmax, statistics, triplets
from flashmetric.catalog.entry import Entry

ENTRIES: tuple[Entry, ...] = (
    *pairwise.ENTRIES,
    *softmax.ENTRIES,
    *statistics.ENTRIES,
    *triplets.ENTRIES,
)

__all__ = ["ENTRIES", "Entry"]
