# SPDX-License-Identifier: Apache-2.0
"""The one exception of the interpreter."""


class PtxError(Exception):
    """The PTX is not understood, or the kernel does something that it must not do."""
