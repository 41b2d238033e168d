"""The fashion mixture in torch: gate and ten experts, put together for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.mixing import mix

EXPERTS, TOP_K, CLASSES, SIDE = 10, 3, 10, 28


class Grey(nn.Module):
    """Bytes [N, 28, 28] to numbers [N, 1, 28, 28] of mean about 0: clients send the picture as it is."""

    def forward(self, image: Tensor) -> Tensor:
        """Bytes uint8 [N, 28, 28] to float [N, 1, 28, 28]."""
        # In the parameters' own type, which calibration makes float64.
        return (image.to(self.scale.dtype) * self.scale - 1.0).unsqueeze(1)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0 / 255))


def _gate() -> nn.Sequential:
    return nn.Sequential(Grey(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 32), nn.ReLU(), nn.Linear(32, EXPERTS))


def _expert() -> nn.Sequential:
    return nn.Sequential(
        Grey(),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, CLASSES),
    )


class Mixture(nn.Module):
    """Picture uint8 [N, 28, 28] to class probabilities [N, 10] by the three experts the gate scores highest."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _gate()
        self.experts = nn.ModuleList(_expert() for _ in range(EXPERTS))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (mixed probabilities [N, 10], gate scores [N, 10])."""
        return mix(self.gate, self.experts, image, TOP_K, CLASSES)
