"""Trains the wearable model on eight wearers, exports it, and prints how well it does on the two it never saw.

python models/wearable/train.py                 # train, export, calibrate, write model.json here
python models/wearable/train.py --folds         # five trainings, each with another pair held out; writes nothing
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import torch
from export import SOURCE, export
from network import TOP_K, Mixture
from torch import Tensor

from models import exporting
from models.mixing import balance_loss

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 1e-2
BALANCE, SMOOTHING = 0.2, 0.05
TURN, GAIN = 0.3, 0.1
CALIBRATION_STRIDE = 16


def disturb(window: Tensor, draw: torch.Generator) -> Tensor:
    """The watch worn a little differently: one small random rotation and gain per window [N, 6, 100]."""
    rows = len(window)
    turn = torch.cat([torch.ones(rows, 1), torch.randn(rows, 3, generator=draw) * TURN / 2], dim=1)
    w, x, y, z = (turn / turn.norm(dim=1, keepdim=True)).unbind(1)
    rotation = torch.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ],
        dim=1,
    ).view(rows, 3, 3)
    turned = torch.cat([rotation @ window[:, :3], rotation @ window[:, 3:]], dim=1)
    return turned * (1 + GAIN * torch.randn(rows, data.AXES, 1, generator=draw))


def train(window: Tensor, label: Tensor, epochs: int, seed: int) -> Mixture:
    """Negative log-likelihood of the mixed answer, smoothed, plus the balance loss that keeps six experts in use."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    mixture = Mixture(window.mean((0, 2)), window.std((0, 2)))
    optimiser = torch.optim.AdamW(mixture.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(window) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(window), generator=draw).split(BATCH):
            mixed, scores = mixture(disturb(window[rows], draw))
            logs = torch.log(mixed + 1e-9)
            right = logs.gather(1, label[rows, None]).mean()
            loss = -(1 - SMOOTHING) * right - SMOOTHING * logs.mean() + BALANCE * balance_loss(scores, TOP_K)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return mixture.eval()


def fold(held_out: tuple[int, int], epochs: int, seed: int) -> tuple[Mixture, np.ndarray, float]:
    """Trains without the wearers `held_out`: (mixture, training windows, accuracy on the windows held out)."""
    start = time.perf_counter()
    window, label, wearer = data.windows()
    unseen = np.isin(wearer, held_out)
    mixture = train(torch.from_numpy(window[~unseen]), torch.from_numpy(label[~unseen]), epochs, seed)
    with torch.no_grad():
        mixed, scores = mixture(torch.from_numpy(window[unseen]))
    accuracy = float((mixed.argmax(1).numpy() == label[unseen]).mean())
    use = torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=scores.shape[1]) / len(scores)
    print(
        f"wearers {held_out} held out: {accuracy:.3f} of {int(unseen.sum())} windows right; each expert's share of"
        f" windows {[round(float(share), 2) for share in use]}; {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return mixture, window[~unseen], accuracy


def main() -> None:
    """Train, export, calibrate, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--version", type=int, default=1, help="version in the manifest")
    parser.add_argument("--weights", type=Path, help="also save the torch weights to this file")
    parser.add_argument("--folds", action="store_true", help="print the accuracy on every pair and stop")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more, OpenMP spins on a shared machine: 4.5 times slower, measured
    torch.use_deterministic_algorithms(True)
    if options.folds:
        mean = np.mean([fold(pair, options.epochs, options.seed)[2] for pair in data.FOLDS])
        print(f"mean {mean:.3f}")
        return
    mixture, seen, _ = fold(data.HELD_OUT, options.epochs, options.seed)
    model = export(mixture, seen[::CALIBRATION_STRIDE], options.out, options.version)
    parameters = {"epochs": options.epochs, "held_out_wearers": list(data.HELD_OUT)}
    used = {"seglearn/data/watch_dataset.npy": data.FILE_SHA256}
    exporting.write_origin(SOURCE, options.out, used, options.seed, parameters)
    if options.weights:
        torch.save(mixture.state_dict(), options.weights)
    print(f"wrote {model.name} version {model.version} to {options.out}")


if __name__ == "__main__":
    main()
