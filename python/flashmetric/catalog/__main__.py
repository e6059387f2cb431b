# SPDX-License-Identifier: Apache-2.0
"""``python -m flashmetric.catalog > docs/losses.md``."""

from flashmetric.catalog import ENTRIES
from flashmetric.catalog.page import render

print(render(ENTRIES), end="")
