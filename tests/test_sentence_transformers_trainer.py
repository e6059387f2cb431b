# SPDX-License-Identifier: Apache-2.0
"""flashmetric.sentence_transformers in training: the Trainer, cached gradients, many processes."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses",
    reason="the peer sentence-transformers (6 or later) is missing",
)

from datasets import Dataset  # noqa: E402
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as peer  # noqa: E402
from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from flashmetric.sentence_transformers import losses  # noqa: E402
from sentence_transformers_cases import (  # noqa: E402
    Encoder,
    assert_agree,
    build,
    outcome,
    sentences,
)

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
WORLD = 2
WORDS = [f"word{i}" for i in range(60)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": GTE},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        {"hardness_mode": "all_negatives", "hardness_strength": 4.0},
    ],
    ids=["default", "gte", "symmetric", "hardness"],
)
@pytest.mark.parametrize("chunks", [{"mini_batch_size": 4}, {"mini_batch_num_tokens": 9}])
def test_cached_is_uncached(options, chunks):
    ours, theirs = build("CachedMultipleNegativesRankingLoss", **options, **chunks)
    uncached, _ = build("MultipleNegativesRankingLoss", **options)
    features = sentences(11, 3)
    # The parent's leaves out padding that a chunk does not need: features must be fresh.
    found = outcome(ours, copy.deepcopy(features))
    assert_agree(found, outcome(theirs, copy.deepcopy(features)))
    assert_agree(found, outcome(uncached, features))


def test_cached_repeats_dropout():
    found = []
    for home in (losses, peer):
        loss = home.CachedMultipleNegativesRankingLoss(
            Encoder(dropout=0.5).double(), mini_batch_size=3
        )
        torch.manual_seed(1)
        found.append(outcome(loss, sentences(10, 2)))
    assert_agree(*found)


def test_cached_without_gradients():
    ours, theirs = build("CachedMultipleNegativesRankingLoss")
    with torch.no_grad():
        values = [loss(sentences(7, 2), None) for loss in (ours, theirs)]
    assert not values[0].requires_grad
    torch.testing.assert_close(*values)


def test_cached_loss_behind_a_scaler():
    # The trainer multiplies the loss before its backward pass.
    ours, _ = build("CachedMultipleNegativesRankingLoss", mini_batch_size=2)
    features = sentences(6, 2)
    expected = outcome(ours, features)
    ours.zero_grad()
    (8 * ours(features, None)).backward()
    for p, grad in zip(ours.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(p.grad, 8 * grad)


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_of_a_fused_loss(cached):
    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    ours, theirs = build(name, **({"mini_batch_size": 4} if cached else {}))
    found = []
    for loss in (ours, theirs):
        loss.model.get_embedding_dimension = lambda: 6
        whole = peer.MatryoshkaLoss(loss.model, loss, [6, 4, 2], [1.0, 0.5, 2.0])
        found.append(outcome(whole, sentences(9, 2)))
    assert_agree(*found)


def tiny_model():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(3)
    module = StaticEmbedding(tokenizer, embedding_dim=16)
    return SentenceTransformer(modules=[module], device="cpu")


def texts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(0, 60, (6,), generator=generator))
        for _ in range(n)
    ]


def dataset(name):
    n = 96
    if "Triplet" in name:
        return Dataset.from_dict({"sentence": texts(n, 0), "label": [i // 4 for i in range(n)]})
    columns = {"anchor": texts(n, 0), "positive": texts(n, 1)}
    if "Contrastive" in name:
        return Dataset.from_dict({**columns, "label": [i % 2 for i in range(n)]})
    return Dataset.from_dict({**columns, "negative": texts(n, 2)})


def train(loss, model, name, folder):
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        per_device_train_batch_size=24,
        max_steps=8,
        learning_rate=0.02,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset(name), loss=loss
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", {"directions": GTE}),
        ("MultipleNegativesRankingLoss", {}),
        ("BatchAllTripletLoss", {"margin": 1.0}),
        ("BatchHardSoftMarginTripletLoss", {}),
        ("BatchSemiHardTripletLoss", {"margin": 0.5}),
        ("OnlineContrastiveLoss", {}),
    ],
)
# Of the trainer's own making.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_training_is_the_parents(name, options, tmp_path):
    curves, weights, cards = [], [], []
    for home in (losses, peer):
        model = tiny_model()
        loss = getattr(home, name)(model, **options)
        curves.append(train(loss, model, name, tmp_path))
        weights.append(model[0].embedding.weight.detach())
        cards.append((model.model_card_data.citations, model.model_card_data.tags))
    ours, theirs = (torch.tensor(curve) for curve in curves)
    assert len(ours) == 8
    # Logged with a few digits; the steps in between may part in the last bits.
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)
    assert (ours[-2:].mean() - ours[:2].mean()).abs() > 1e-3
    assert cards[0] == cards[1]
    assert f"loss:{name}" in cards[0][1]


def gathered(rank, store):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=10),
    )
    try:
        for directions, mode in ((GTE, "all_negatives"), (GTE[::2], None), (GTE, None)):
            options = {"directions": directions, "gather_across_devices": True}
            options |= {"hardness_mode": mode, "hardness_strength": 3.0 if mode else 0.0}
            for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
                ours, theirs = build(name, **options)
                features = sentences(5, 3, seed=rank)
                assert_agree(outcome(ours, features), outcome(theirs, features))
    finally:
        dist.destroy_process_group()


# The parent's gathering is of a function that torch 2.13 deprecates.
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather:FutureWarning")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the Gloo backend")
def test_gathering_across_devices(tmp_path):
    # One process is this one: another takes half a minute to import everything.
    other = torch.multiprocessing.get_context("spawn").Process(
        target=gathered, args=(1, tmp_path / "store")
    )
    other.start()
    try:
        gathered(0, tmp_path / "store")
    finally:
        other.join()
    assert other.exitcode == 0
