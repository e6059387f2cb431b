# SPDX-License-Identifier: Apache-2.0
"""What the loss modules share: hyper-parameters as attributes, a function that does the work."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from flashmetric.labels import Labels


class Loss(nn.Module):
    """A loss over the labelled pairs of a batch, or over pairs that a miner has chosen.

    A subclass names its ``function``, and passes the hyper-parameters to ``__init__`` under the
    names by which that function takes them. They become attributes: plain ones, learned parameters
    if they are ``nn.Parameter``, submodules if they are modules (a distance with parameters).
    """

    function: ClassVar[Callable[..., Tensor]]
    check: ClassVar[Callable[..., None] | None] = None
    """Raises unless the hyper-parameters are valid; gets them under the same names."""

    def __init__(self, **options: Any) -> None:
        """Check and store the hyper-parameters."""
        super().__init__()
        check = type(self).check
        if check is not None:
            check(**options)
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """See the function of the loss in :mod:`flashmetric.functional`."""
        options = {name: getattr(self, name) for name in self._options}
        return type(self).function(
            embeddings,
            labels,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
            **options,
        )

    def extra_repr(self) -> str:
        """Hyper-parameters, as the constructor takes them."""
        plain = (name for name in self._options if name in self.__dict__)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in plain)
