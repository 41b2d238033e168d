"""Coverage-guided fuzzing of every decoder, one process a target: `make fuzz`, or `python tests/fuzz/run.py TARGET...`.

Without arguments all targets are struck for FUZZ_SECONDS each (default 60), and the exit code is 1 if any was broken;
the reproducers then lie in tests/fuzz/found. `run.py TARGET FILE` strikes once with the bytes of a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
CORPUS, FOUND = HERE / "corpus", HERE / "found"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
RSS_MB = 768
INPUT_BYTES = 64 * 1024
SLOW_S = 10
CHILD = "BMOE_FUZZ_TARGET"


def main(arguments: list[str]) -> int:
    """Strike the targets named, all where none is; the number of those that broke, as an exit code of 0 or 1."""
    import targets

    unknown = [name for name in arguments if name not in targets.TARGETS and not Path(name).is_file()]
    if unknown:
        print(f"no target {', '.join(unknown)}; there are: {', '.join(targets.TARGETS)}", file=sys.stderr)
        return 2
    if len(arguments) == 2 and Path(arguments[1]).is_file():
        print("taken" if targets.TARGETS[arguments[0]].strike(Path(arguments[1]).read_bytes()) else "refused")
        return 0
    broken = [name for name in arguments or targets.TARGETS if not fuzz(name)]
    print(f"{len(broken)} of {len(arguments or targets.TARGETS)} targets broke: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


def fuzz(name: str) -> bool:
    """One target in a process of its own; False where something was found."""
    corpus, found = CORPUS / name, FOUND / name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    print(f"--- {name}", flush=True)
    command = [
        sys.executable, str(Path(__file__)), f"-max_total_time={SECONDS}", f"-rss_limit_mb={RSS_MB}",
        f"-max_len={INPUT_BYTES}", f"-timeout={SLOW_S}", "-print_final_stats=1", f"-artifact_prefix={found}/", str(corpus),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, CHILD: name}, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    print("\n".join(told) if done.returncode == 0 else done.stderr[-6000:], flush=True)
    if done.returncode:
        print(f"{name} broke; again: {sys.executable} {Path(__file__)} {name} FILE, with a FILE of {found}", flush=True)
    return done.returncode == 0


def strike_for_ever(name: str) -> None:
    """The child: the decoders are instrumented while they are imported, then libFuzzer takes over."""
    import atheris

    with atheris.instrument_imports(include=["bmoe", "coordinator", "edge_agent"]):
        import targets
    target = targets.TARGETS[name]
    for number, data in enumerate(target.honest):
        (CORPUS / name / f"honest-{number}").write_bytes(data)

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        random = Random(seed)
        if target.vary is not None and random.random() < 0.4:
            try:
                return target.vary(random, data)[:size_max]
            except Exception:  # it varies what is well-formed; what is not, is left to the fuzzer
                pass
        return atheris.Mutate(data, size_max)

    def one(data: bytes) -> None:
        target.strike(data)

    atheris.Setup(sys.argv, one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if CHILD in os.environ:
        strike_for_ever(os.environ[CHILD])
    else:
        sys.exit(main(sys.argv[1:]))
