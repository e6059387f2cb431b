# SPDX-License-Identifier: Apache-2.0
"""A module that belongs to a process group."""

import copy
from typing import Any

from torch import nn


class GroupModule(nn.Module):
    """Copies of it are of the same process group, which is no data of theirs."""

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupModule":
        """Copy everything but the group."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.group)] = self.group
        # PyTorch's own, whatever a class does for pickle.
        state = nn.Module.__getstate__(self)
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied
