# SPDX-License-Identifier: Apache-2.0
"""A module that belongs to a process group."""

import copy
from typing import Any

import torch.distributed as dist
from torch import nn

# In a pickle, in place of the default process group: each process has its own object.
_DEFAULT_GROUP = "default"


class GroupModule(nn.Module):
    """Copies of it are of the same process group, which is no data of theirs.

    ``copy.copy`` and ``copy.deepcopy`` keep the group, whichever it is. ``pickle`` (and with it
    ``torch.save`` of the module) takes None and the default group, for which the module looks in
    the process where it is called next; any other raises TypeError. ``state_dict`` has no group.
    """

    group: Any

    def joined_group(self) -> "dist.ProcessGroup | None":
        """The process group; after a pickle, the default one of this process."""
        if self.group == _DEFAULT_GROUP:
            if not dist.is_initialized():
                raise RuntimeError(
                    "group is the default process group of the process that pickled this "
                    f"{type(self).__name__}; call torch.distributed.init_process_group first"
                )
            self.group = dist.group.WORLD
        group: dist.ProcessGroup | None = self.group
        return group

    def __copy__(self) -> "GroupModule":
        """Share everything, the group too."""
        copied = type(self).__new__(type(self))
        # PyTorch's own, whatever this class does for pickle.
        copied.__setstate__(nn.Module.__getstate__(self))  # type: ignore[no-untyped-call]
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupModule":
        """Copy everything but the group."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.group)] = self.group
        state = nn.Module.__getstate__(self)
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which takes no other process group than the default one."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        if self.group is not None and self.group != _DEFAULT_GROUP:
            if self.group is not dist.group.WORLD:
                raise TypeError(
                    "group must be None or the default process group for a "
                    f"{type(self).__name__} to be pickled; got another one: save its state_dict() "
                    "instead"
                )
            state["group"] = _DEFAULT_GROUP
        return state
