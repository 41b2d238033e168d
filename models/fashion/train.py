"""Trains the fashion model on the 60,000 training pictures, exports it, and prints how well it does on the other 10,000.

python models/fashion/train.py                 # train, export, calibrate, write model.json here
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import torch
from network import SIDE, TOP_K, Mixture
from torch import Tensor

from models import exporting
from models.mixing import balance_loss

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 1e-2
BALANCE = 0.1
CALIBRATION_ROWS = 512
SOURCE = exporting.Source(
    name="fashion",
    licence="MIT",
    description="Which of ten kinds of clothing a grey picture of 28 x 28 bytes shows. Top 3 of 10 small CNNs.",
    labels=data.LABELS,
    top_k=TOP_K,
    input="image",
    dtype="uint8",
    dims=(SIDE, SIDE),
    memory_mb=16,
)


def train(image: Tensor, label: Tensor, epochs: int, seed: int) -> Mixture:
    """Negative log-likelihood of the mixed answer, plus the balance loss that keeps ten experts in use."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    mixture = Mixture()
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(image) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(image), generator=draw).split(BATCH):
            mixed, scores = mixture(image[rows])
            right = torch.log(mixed + 1e-9).gather(1, label[rows, None]).mean()
            loss = -right + BALANCE * balance_loss(scores, TOP_K)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return mixture.eval()


def judge(mixture: Mixture) -> float:
    """Accuracy on the held-out pictures, printed with each expert's share of them."""
    image, label = data.held_out()
    with torch.no_grad():
        mixed, scores = mixture(torch.from_numpy(image.copy()))
    accuracy = float((mixed.argmax(1).numpy() == label).mean())
    use = torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=scores.shape[1]) / len(scores)
    print(
        f"held out: {accuracy:.4f} of {len(label)} pictures right; each expert's share {[round(float(u), 2) for u in use]}"
    )
    return accuracy


def main() -> None:
    """Train, export, calibrate, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rows", type=int, default=60_000, help="train on the first so many pictures alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--version", type=int, default=1, help="version in the manifest")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, OpenMP spins on a shared machine: 4.5 times slower, measured
    torch.use_deterministic_algorithms(True)
    start = time.process_time()
    image, label = (array[: options.rows] for array in data.training())
    mixture = train(torch.from_numpy(image.copy()), torch.from_numpy(label), options.epochs, options.seed)
    judge(mixture)
    calibration = np.ascontiguousarray(image[:CALIBRATION_ROWS])
    model = exporting.export(SOURCE, mixture.gate, list(mixture.experts), calibration, options.out, options.version)
    used = {name: data.FILES[name] for name in data.FILES if name.startswith("train-")}
    parameters = {"epochs": options.epochs, "rows": options.rows}
    exporting.write_origin(SOURCE, options.out, used, options.seed, parameters)
    print(f"wrote {model.name} version {model.version} to {options.out}; {time.process_time() - start:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
