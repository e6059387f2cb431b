# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch training loop, with bfloat16 autocast and torch.compile as options.

python examples/train_pytorch.py --bf16 --compile
"""

import digits
import torch
from torch import Tensor

import flashmetric


def main() -> None:
    """Train, and compare the scores before and after."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument(
        "--compile",
        metavar="BACKEND",
        nargs="?",
        const="inductor",
        help="compile model and loss together",
    )
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)

    split = digits.load_digits()
    encoder = digits.encoder(split).to(device)
    loss_fn = flashmetric.TripletMarginLoss(margin=0.2)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    before = digits.evaluate(encoder, split.test, device)

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
            return loss_fn(encoder(images), labels)

    step = forward
    if options.compile:
        step = torch.compile(forward, fullgraph=True, backend=options.compile)

    batches = 40 if options.quick else 300
    for number, batch in enumerate(digits.loader(split.train, batches=batches, seed=options.seed)):
        images, labels = (tensor.to(device) for tensor in batch)
        loss = step(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 10 == 0:
            print(f"step {number:4}  loss {loss.item():.4f}")

    digits.require_better(before, digits.evaluate(encoder, split.test, device))


if __name__ == "__main__":
    main()
