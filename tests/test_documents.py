# SPDX-License-Identifier: Apache-2.0
"""Every block of Python in the README and in docs/ runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmetric

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/migration.md")
NEEDS = {
    "flashmetric.pml": "pytorch_metric_learning",
    "flashmetric.sentence_transformers": "sentence_transformers",
}


def names() -> dict[str, Any]:
    """What documents take for granted: a reader's own tensors and encoder."""
    encoder = torch.nn.Linear(20, 8)
    inputs, labels = torch.randn(64, 20), torch.arange(64) // 4
    one, two, three = (torch.randn(64, 8, requires_grad=True) for _ in range(3))
    return {
        "torch": torch,
        "flashmetric": flashmetric,
        "encoder": encoder,
        "key_encoder": torch.nn.Linear(20, 8).requires_grad_(False),
        "inputs": inputs,
        "labels": labels,
        "x": encoder(inputs),
        "anchors": one,
        "positives": two,
        "negatives": three,
        "view1": one,
        "view2": two,
        "model": torch.nn.Linear(2, 2),
        "features": torch.stack([one, two], 1),
        "images": one,
        "texts": two,
    }


def blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    # What stands before "## Use" in the README shows what users have, not what they should write.
    text = text.partition("## Use\n")[2] or text
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_documents_have_code() -> None:
    assert all(len(blocks(document)) > 5 for document in DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_runs(document: str) -> None:
    known = names()
    for block in blocks(document):
        for module, package in NEEDS.items():
            if module in block:
                pytest.importorskip(package)
        known.pop("loss", None)
        exec(compile(block, document, "exec"), known)
        if isinstance(known.get("loss"), torch.Tensor):
            assert torch.isfinite(known["loss"])


PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in path.read_text().splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith(("http://", "https://")):
            assert (path.parent / target.partition("#")[0]).exists(), target
