"""The drift table: `make drift` measures it anew and writes docs/results/drift.md; the tests measure it and compare.

Each sample is run by the worker that agents run experts with, on this machine and on three emulated boards.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from coordinator.emulate.board import EmulatedBoard
from coordinator.emulate.compute import compute
from coordinator.emulate.drift import Drift, compare
from coordinator.emulate.workshop import Workshop

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sample_models import OUTPUT, SAMPLES, Sample, write

KEPT = Path(__file__).resolve().parents[2] / "docs" / "results" / "drift.md"
BOARDS = ("rpi3", "rpi4", "rpi5")
HERE, SATURATING = "x86-64", "x86-64, imprecise"
NEAR = 1e-5  # absolute, for outputs of size 1: the class of honest fp32 between architectures


@dataclass(frozen=True)
class Row:
    """One model on one processor against this machine with an agent's options."""

    sample: Sample
    processor: str
    drift: Drift

    @property
    def kind(self) -> str:
        """The class of the result, which does not change from run to run as its figures may."""
        if self.drift.equal:
            return "equal"
        return "near" if self.drift.max_abs <= NEAR else "apart"


def measure(boards: Sequence[EmulatedBoard], folder: Path) -> tuple[list[Row], dict[str, dict[str, np.ndarray]]]:
    """Every sample everywhere; beside the rows, the boards' outputs by processor and sample."""
    jobs = [(write(sample, folder), sample.inputs()) for sample in SAMPLES]
    names = [sample.name for sample in SAMPLES]
    here = compute("", jobs)
    there = {SATURATING: compute("", jobs, variant="saturating")}
    with ThreadPoolExecutor() as pool:
        emulated = pool.map(lambda board: compute(str(board.python), jobs), boards)
        there |= {processor_of(board): outputs for board, outputs in zip(boards, emulated, strict=True)}
    rows = [
        Row(sample, processor, compare(native, outputs[number])[0])
        for number, (sample, native) in enumerate(zip(SAMPLES, here, strict=True))
        for processor, outputs in there.items()
        if sample.int8 or processor != SATURATING
    ]
    arrays = {p: {n: o[OUTPUT] for n, o in zip(names, outputs, strict=True)} for p, outputs in there.items()}
    return rows, arrays


def processor_of(board: EmulatedBoard) -> str:
    """As the table names it: Cortex-A72 (rpi4)."""
    return f"{board.profile.cpu.replace('cortex-a', 'Cortex-A')} ({board.name})"


def rendered(rows: Sequence[Row], qemu: str) -> str:
    """The document."""
    lines = [
        "# Drift between processors",
        "",
        "Made by `make drift`, never by hand. Each model is run on 64 rows of fixed seed by the worker that agents run",
        f"experts with: on {HERE} with an agent's options, and on emulated boards. A figure is what differs from",
        f"{HERE}. `equal` is bit for bit, `near` within {NEAR:g} absolute (outputs are of size 1), `apart` more.",
        f"`{SATURATING}` is {HERE} without `session.x64quantprecision`, the option that an agent always sets.",
        "",
        "| model | processor | class | max abs | of the range | same class chosen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        d = row.drift
        lines.append(
            f"| {row.sample.title} | {row.processor} | {row.kind} | {d.max_abs:.1e} | {d.of_range:.1e} | {d.argmax:.1%} |"
        )
    lines += [
        "",
        f"Measured on {cpu_name()} with onnxruntime {onnxruntime.__version__} and {qemu}.",
        "User emulation computes what the named processor's instructions define; that a board's silicon gives the same",
        "was not measured.",
    ]
    return "\n".join(lines) + "\n"


def kept_classes() -> dict[tuple[str, str], str]:
    """(model, processor) -> class, as the kept document has them."""
    found = re.findall(r"^\| (.+?) \| (.+?) \| (equal|near|apart) \|", KEPT.read_text(encoding="utf-8"), re.M)
    return {(model, processor): kind for model, processor, kind in found}


def cpu_name() -> str:
    """This machine's processor."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1] if found else platform.machine()


def main(say: Callable[[str], None] = print) -> int:
    """Measure and write."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder) / "boards", say)
        boards = [workshop.board(name) for name in BOARDS]
        rows, _ = measure(boards, Path(folder))
        KEPT.write_text(rendered(rows, workshop.qemu_version()), encoding="utf-8")
    say(f"wrote {KEPT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
