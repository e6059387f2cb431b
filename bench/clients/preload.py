# SPDX-License-Identifier: Apache-2.0
"""Imported by the process that workers are forked from, so that each of them starts at once.

Nothing here may run PyTorch: threads do not survive the fork.
"""

import contextlib
import importlib
import os

from bench.clients.texts import library_texts

# Before transformers and datasets are imported: no progress bars, no look at the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

MODULES = (
    "sklearn.datasets",
    "pytorch_metric_learning.losses",
    "pytorch_metric_learning.miners",
    "flashmetric.pml",
    "sentence_transformers.sentence_transformer.losses",
    "datasets",
    "transformers",
)

for name in MODULES:
    # What is not installed is reported by the contenders that need it.
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
library_texts()
