"""The wearable mixture in torch: gate, experts, and the rule that combines them (the coordinator's rule, exactly)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXPERTS, TOP_K, CLASSES, AXES = 6, 2, 7, 6


class Normalise(nn.Module):
    """Per-axis constants of the training wearers, so that clients send the watch's own units."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, AXES, 1))
        self.register_buffer("scale", 1.0 / std.reshape(1, AXES, 1))

    def forward(self, window: Tensor) -> Tensor:
        return (window - self.mean) * self.scale


def _body(mean: Tensor, std: Tensor, widths: tuple[int, int, int], outputs: int) -> nn.Sequential:
    a, b, c = widths
    return nn.Sequential(
        Normalise(mean, std),
        nn.Conv1d(AXES, a, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv1d(a, b, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(b, c, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(c, outputs),
    )


class Mixture(nn.Module):
    """Window float32 [N, 6, 100] to class probabilities [N, 7] by the two experts the gate scores highest."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.gate = _body(mean, std, (8, 8, 16), EXPERTS)
        self.experts = nn.ModuleList(_body(mean, std, (16, 32, 32), CLASSES) for _ in range(EXPERTS))

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (mixed probabilities [N, 7], gate scores [N, 6])."""
        scores = torch.softmax(self.gate(window), dim=1)
        top, chosen = scores.topk(TOP_K, dim=1)
        weights = top / top.sum(dim=1, keepdim=True)
        mixed = window.new_zeros(len(window), CLASSES)
        for number, expert in enumerate(self.experts):
            rows, slots = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                answer = torch.softmax(expert(window[rows]), dim=1)
                mixed = mixed.index_add(0, rows, weights[rows, slots, None] * answer)
        return mixed, scores


def balance_loss(scores: Tensor) -> Tensor:
    """1 when all experts get equal work, up to EXPERTS when one gets all (arXiv 2101.03961, equation 4, for top-k)."""
    chosen = scores.topk(TOP_K, dim=1).indices
    share = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
    return EXPERTS * (share * scores.mean(dim=0)).sum()
