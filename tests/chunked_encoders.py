# SPDX-License-Identifier: Apache-2.0
"""An encoder for the tests of chunked encoding, and what is compared."""

import torch
from torch import nn

from flashmetric import InfoNCELoss


class Encoder(nn.Module):
    """Dropout, a buffer that counts the rows seen, and wide activations."""

    def __init__(self, dropout=0.0, features=6):
        super().__init__()
        self.first = nn.Linear(features, 32)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(32, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.seen += len(x)
        return self.second(self.dropout(self.first(x).tanh())) * scale


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def clear(*modules):
    for module in modules:
        module.zero_grad()


def chunked(encoder, x, chunk_size):
    return torch.cat([encoder(part) for part in x.split(chunk_size)])


def of_both(a, b):
    return InfoNCELoss()(a, ref_emb=b)
