# SPDX-License-Identifier: Apache-2.0
"""What the loss modules share: hyper-parameters as attributes, a function that does the work."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from flashmetric.checks import check_choice
from flashmetric.labels import Labels
from flashmetric.losses.temperature import LearnedTemperature

L = TypeVar("L", bound="Loss")


class Loss(nn.Module):
    """A loss over the labelled pairs of a batch, or over pairs that a miner has chosen.

    A subclass names its ``function``, and passes the hyper-parameters to ``__init__`` under the
    names by which that function takes them. They become attributes: plain ones, buffers if they are
    tensors, learned parameters if they are ``nn.Parameter``, submodules if they are modules (a
    distance with parameters).
    """

    function: ClassVar[Callable[..., Tensor]]
    check: ClassVar[Callable[..., None] | None] = None
    """Raises unless the hyper-parameters are valid; gets them under the same names."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Hyper-parameters by which others define the loss; a module is given as its class."""

    def __init__(self, **options: Any) -> None:
        """Check and store the hyper-parameters."""
        super().__init__()
        check = type(self).check
        if check is not None:
            check(**{name: _value(option) for name, option in options.items()})
        self._options = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @classmethod
    def preset(cls: type[L], name: str, **overrides: Any) -> L:
        """The loss as a paper, a course or another library defines it by default.

        Args:
            name: one of the presets that the class describes.
            **overrides: hyper-parameters to set differently.

        Raises:
            TypeError: there is no such hyper-parameter.
            ValueError: the preset is unknown, or the class has none.
        """
        if not cls.presets:
            raise ValueError(f"{cls.__name__} has no presets; got name {name!r}")
        check_choice("name", name, tuple(cls.presets))
        options = {**cls.presets[name], **overrides}
        # Modules are made for each loss anew.
        made = {key: v() if isinstance(v, type) else v for key, v in options.items()}
        return cls(**made)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
    ) -> Tensor:
        """See the function of the loss in :mod:`flashmetric.functional`.

        The order of arguments is that of pytorch-metric-learning. The functions themselves, and
        what a loss adds to these, take them by keyword.
        """
        return type(self).function(
            embeddings,
            labels,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
            **self._arguments(),
        )

    def _arguments(self) -> dict[str, Any]:
        """Hyper-parameters as the function takes them."""
        return {name: _value(getattr(self, name)) for name in self._options}

    def extra_repr(self) -> str:
        """Hyper-parameters, as the constructor takes them."""
        known = {**self.__dict__, **self._parameters, **self._buffers}
        return ", ".join(f"{n}={_shown(known[n])}" for n in self._options if n in known)


def _shown(option: Any) -> str:
    # Not its numbers: a device would have to be waited for.
    return f"tensor of shape {tuple(option.shape)}" if isinstance(option, Tensor) else repr(option)


def _value(option: Any) -> Any:
    return option() if isinstance(option, LearnedTemperature) else option
