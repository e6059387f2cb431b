# SPDX-License-Identifier: Apache-2.0
"""All comparisons, at full size and at the size that only shows that they run."""

from bench.clients import PARTS
from bench.clients.loops import NATIVE, RECIPES
from bench.clients.session import Comparison, Contender, Options

PEER, OURS, OWN_MEMORY = "peer", "flashmetric", "flashmetric.CrossBatchMemory"
ONE_LINE = "flashmetric.sentence_transformers"
BACKWARDS = "peer, rows reversed"
PLAIN, PEER_PLAIN = "flashmetric, plain", "peer, plain"
TORCH = "plain torch"

PML_LOOPS = "Training loops of pytorch-metric-learning"
ST_LOOPS = "Training loops of sentence-transformers"
MEMORY = "Cross-batch memory"
CHUNKS = "Chunked encoding (GradCache)"
DENSE = "Dense descriptors"
SECTIONS = (PML_LOOPS, ST_LOOPS, MEMORY, CHUNKS, DENSE)
FEATURES = 128
DENSE_FEATURES = 32
# The gate has to see pairs of all kinds, and the peers must be able to do it.
_GATE_ROWS, _GATE_MEMORY = 96, 1500
_ST_PEER = "sentence_transformers.sentence_transformer.losses"
_ST_OURS = "flashmetric.sentence_transformers.losses"
_ST_LOSSES = (
    "MultipleNegativesRankingLoss",
    "BatchHardTripletLoss",
    "BatchAllTripletLoss",
    "ContrastiveLoss",
    "OnlineContrastiveLoss",
)
_VIEWS_NOTE = "two views of each image"


def pml_loops(quick: bool, folder: str | None) -> list[Comparison]:
    """Encoder, loss and optimiser; other import."""
    found = []
    for recipe in RECIPES:
        if "all triplets" in recipe:
            continue
        for rows, steps in ((48, 3),) if quick else ((256, 40), (1024, 15)):
            sides = [
                Contender(PEER, {"library": "pytorch_metric_learning"}),
                Contender(OURS, {"library": "flashmetric.pml"}, ours=True),
            ]
            # How far curves drift apart by rounding alone.
            reversed_rows = {"library": "pytorch_metric_learning", "backwards": True}
            sides.append(Contender(BACKWARDS, reversed_rows))
            found.append(
                Comparison(
                    PML_LOOPS,
                    recipe,
                    "bench.clients.loops:Loop",
                    rows,
                    FEATURES,
                    tuple(sides),
                    {"recipe": recipe, "rows": rows, "features": FEATURES, "folder": folder},
                    {"rows": min(rows, _GATE_ROWS)},
                    steps,
                    curve=True,
                    note=_VIEWS_NOTE if recipe == "NTXentLoss" else "",
                )
            )
    return found


def trainer_loops(quick: bool) -> list[Comparison]:
    """``SentenceTransformerTrainer``; other import."""
    found = []
    for loss in _ST_LOSSES:
        for rows, steps in ((32, 3),) if quick else ((256, 20), (1024, 8)):
            options = {"loss": loss, "rows": rows, "steps": steps}
            found.append(
                Comparison(
                    ST_LOOPS,
                    loss,
                    "bench.clients.trainer:TrainerLoop",
                    rows,
                    FEATURES,
                    (
                        Contender(PEER, {"library": _ST_PEER}),
                        Contender(OURS, {"library": _ST_OURS}, ours=True),
                    ),
                    options,
                    {"rows": min(rows, _GATE_ROWS), "steps": 2},
                    steps,
                    curve=True,
                )
            )
    return found


def memory(quick: bool, folder: str | None) -> list[Comparison]:
    """The first recipe once more, with the rows of 50,000 earlier images."""
    rows, size = (32, 1000) if quick else (256, 50_000)
    found = []
    for recipe in NATIVE:
        options = {"recipe": recipe, "rows": rows, "features": FEATURES, "folder": folder}
        found.append(
            Comparison(
                MEMORY,
                recipe,
                "bench.clients.loops:Loop",
                rows,
                FEATURES,
                (
                    Contender(PEER, {"library": "pytorch_metric_learning"}),
                    Contender(OURS, {"library": "flashmetric.pml"}, ours=True),
                    Contender(OWN_MEMORY, {"library": "flashmetric"}, ours=True),
                ),
                options | {"memory": size},
                # The peer lists every triplet.
                {"rows": 24, "memory": 300}
                if "all triplets" in recipe
                else {"rows": min(rows, _GATE_ROWS), "memory": min(size, _GATE_MEMORY)},
                3 if quick else 8,
                curve=True,
                note=f"memory of {size:,} rows",
            )
        )
    return found


def chunks(quick: bool, folder: str | None) -> list[Comparison]:
    """One step of a batch of 8,192 in chunks, and in one piece."""
    rows = 64 if quick else 8192

    def comparison(kernel: str, name: str, options: Options, note: str) -> Comparison:
        builder, gate = f"bench.clients.chunked:{name}", {"rows": 64, "chunk": 16}
        contenders = [
            Contender(PEER, {"method": "peer chunked"}),
            Contender(OURS, {"method": "grad_cache"}, ours=True),
            Contender(PEER_PLAIN, {"method": "peer plain"}),
            Contender(PLAIN, {"method": "fused plain"}, ours=True),
        ]
        if name == "Ranking":
            contenders.insert(2, Contender(ONE_LINE, {"method": "fused chunked"}, ours=True))
        return Comparison(
            CHUNKS, kernel, builder, rows, FEATURES, tuple(contenders), options, gate, 3, note=note
        )

    return [
        comparison(
            "two towers, MultipleNegativesRankingLoss",
            "Ranking",
            {"rows": rows, "chunk": 64},
            "sentence-transformers; two layers of attention, up to 16 tokens, chunks of 64",
        ),
        comparison(
            "supervised, SupConLoss",
            "Supervised",
            {"rows": rows, "features": FEATURES, "chunk": 256, "folder": folder},
            "pytorch-metric-learning, chunked by hand; convolutions on 32 x 32, chunks of 256",
        ),
    ]


def dense(quick: bool) -> list[Comparison]:
    """Every pixel against every pixel of another view."""
    contenders = (
        Contender(TORCH, {"library": "torch"}),
        Contender(OURS, {"library": "flashmetric"}, ours=True),
        Contender(PEER, {"library": "pytorch-metric-learning"}),
    )
    return [
        Comparison(
            DENSE,
            loss,
            "bench.clients.dense:Dense",
            pixels,
            DENSE_FEATURES,
            contenders,
            {"loss": loss, "pixels": pixels, "features": DENSE_FEATURES},
            {"pixels": 512},
            4,
        )
        for loss in ("InfoNCE", "batch-hard triplet")
        for pixels in ((1024,) if quick else (4096, 8192, 16_384, 32_768, 65_536))
    ]


def grid(quick: bool = False, parts: list[str] | None = None, folder: str | None = None):
    """The comparisons of a run.

    Args:
        quick: Small sizes, a few steps.
        parts: Some of ``PARTS``; all if None or empty.
        folder: Folder of IDX files; None for scikit-learn's digits.

    Returns:
        The comparisons in the order of the report.
    """
    whole = [
        *pml_loops(quick, folder),
        *trainer_loops(quick),
        *memory(quick, folder),
        *chunks(quick, folder),
        *dense(quick),
    ]
    sections = dict(zip(PARTS, SECTIONS, strict=True))
    wanted = {sections[part] for part in parts or PARTS}
    return [comparison for comparison in whole if comparison.section in wanted]
