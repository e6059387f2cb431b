# SPDX-License-Identifier: Apache-2.0
"""A training loop written for pytorch-metric-learning, with its import changed.

Losses, miners, distances, reducers and the cross-batch memory come from flashmetric.pml; samplers
still come from pytorch-metric-learning. The same loop on that library's own classes:

python examples/train_pytorch_metric_learning.py --peer
"""

import digits
import numpy as np
import torch
from pytorch_metric_learning import samplers
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    """Train, and compare the scores before and after."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--peer", action="store_true", help="use pytorch-metric-learning itself")
    options = parser.parse_args()
    if options.peer:
        from pytorch_metric_learning import distances, losses, miners, reducers
    else:
        from flashmetric.pml import distances, losses, miners, reducers

    torch.manual_seed(options.seed)
    np.random.seed(options.seed)  # the sampler's source of random numbers
    split = digits.load_digits()
    encoder = digits.encoder(split, dim=64).to(options.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    before = digits.evaluate(encoder, split.test, options.device)

    miner = miners.MultiSimilarityMiner(epsilon=0.1)
    of_batch = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    of_memory = losses.CrossBatchMemory(
        losses.ContrastiveLoss(
            pos_margin=0.2,
            neg_margin=0.8,
            distance=distances.LpDistance(normalize_embeddings=True),
            reducer=reducers.AvgNonZeroReducer(),
        ),
        embedding_size=64,
        memory_size=1000,
    )
    batches = 20 if options.quick else 300
    sampler = samplers.MPerClassSampler(
        split.train.labels, m=16, batch_size=160, length_before_new_iter=160 * batches
    )
    data = TensorDataset(split.train.images, split.train.labels)
    for number, batch in enumerate(DataLoader(data, batch_size=160, sampler=sampler)):
        images, labels = (tensor.to(options.device) for tensor in batch)
        embeddings = encoder(images)
        loss = of_batch(embeddings, labels, miner(embeddings, labels))
        loss = loss + of_memory(embeddings, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 5 == 0:
            print(f"step {number:4}  loss {loss.item():.4f}")

    digits.require_better(before, digits.evaluate(encoder, split.test, options.device))


if __name__ == "__main__":
    main()
