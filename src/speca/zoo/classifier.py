"""The small convolutional classifier that scores the bundled Fashion-MNIST model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FashionClassifier(nn.Module):
    """Ten-way classifier of 28 x 28 grey garments, about 70 k parameters.

    Input ``(B, 1, 28, 28)`` in [-1, 1], output logits ``(B, 10)``.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def stage(inner: int, outer: int) -> list[nn.Module]:
            return [
                nn.Conv2d(inner, outer, 3, padding=1, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
                nn.Conv2d(outer, outer, 3, padding=1, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]

        self.body = nn.Sequential(*stage(1, width), *stage(width, 2 * width), *stage(2 * width, 4 * width))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * width, 10))

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(images)))
