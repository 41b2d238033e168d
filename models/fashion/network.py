"""The fashion mixture in torch: gate, ten experts, and the rule that combines them (the coordinator's rule, exactly)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXPERTS, TOP_K, CLASSES, SIDE = 10, 3, 10, 28


class Grey(nn.Module):
    """Bytes [N, 28, 28] to numbers [N, 1, 28, 28] of mean about 0: clients send the picture as it is."""

    def forward(self, image: Tensor) -> Tensor:
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
        scores = torch.softmax(self.gate(image), dim=1)
        top, chosen = scores.topk(TOP_K, dim=1)
        weights = top / top.sum(dim=1, keepdim=True)
        mixed = weights.new_zeros(len(image), CLASSES)
        for number, expert in enumerate(self.experts):
            rows, slots = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                answer = torch.softmax(expert(image[rows]), dim=1)
                mixed = mixed.index_add(0, rows, weights[rows, slots, None] * answer)
        return mixed, scores


def balance_loss(scores: Tensor) -> Tensor:
    """1 when all experts get equal work, up to EXPERTS when one gets all (arXiv 2101.03961, equation 4, for top-k)."""
    chosen = scores.topk(TOP_K, dim=1).indices
    share = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
    return EXPERTS * (share * scores.mean(dim=0)).sum()
