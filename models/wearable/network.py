"""The wearable mixture in torch: gate and experts, put together for training."""

from __future__ import annotations

from torch import Tensor, nn

from models.mixing import mix

EXPERTS, TOP_K, CLASSES, AXES = 6, 2, 7, 6


class Normalise(nn.Module):
    """Per-axis constants of the training wearers, so that clients send the watch's own units."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, AXES, 1))
        self.register_buffer("scale", 1.0 / std.reshape(1, AXES, 1))

    def forward(self, window: Tensor) -> Tensor:
        """Windows [N, 6, 100] of the watch's units to numbers of mean 0 and deviation 1 on each axis."""
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
        return mix(self.gate, self.experts, window, TOP_K, CLASSES)
