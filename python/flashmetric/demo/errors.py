# SPDX-License-Identifier: Apache-2.0
"""The one exception the job reports as a single line, and optional packages."""

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class DemoError(Exception):
    """Something the user can put right; shown as one line, never as a traceback."""


def require_packages(modules: Iterable[str]) -> None:
    """Check that optional packages are installed before any work is done.

    Args:
        modules: Import names, such as ``"matplotlib"``.

    Raises:
        DemoError: If any is missing; the message holds the pip command for all of them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(_DISTRIBUTIONS.get(name, name) for name in missing)
        raise DemoError(
            f"missing optional packages; install them with: python -m pip install {names}"
        )


def optional_module(name: str) -> ModuleType:
    """Import an optional package by name, so that importing this package needs none of them."""
    require_packages([name.partition(".")[0]])
    return importlib.import_module(name)
