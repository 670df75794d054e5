"""The small convolutional classifiers that score the bundled models."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Classifier of small pictures: stages of two convolutions, each halving the side and doubling the width.

    Input ``(B, channels, H, W)`` in [-1, 1] with sides divisible by 2**stages, or rounded down; output logits
    ``(B, classes)``. The defaults are those of the Fashion-MNIST scorer, about 70 k parameters.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16, stages: int = 3) -> None:
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

        widths = [channels, *(width * 2**k for k in range(stages))]
        pairs = itertools.pairwise(widths)
        self.body = nn.Sequential(*(layer for inner, outer in pairs for layer in stage(inner, outer)))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1], classes)]
        self.head = nn.Sequential(*head)

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> Classifier:
        """Return the classifier with the weights `state`, in eval mode and float32; sizes follow from the shapes."""
        convolutions = [value for name, value in state.items() if name.startswith("body") and value.ndim == 4]
        width, channels = convolutions[0].shape[:2]
        model = cls(channels, len(state["head.3.bias"]), width, len(convolutions) // 2)
        model.load_state_dict(state)
        return model.eval()

    def forward(self, images: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(images)))
