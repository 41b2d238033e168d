"""An example source: a sensor on a serial line asks a model about each window of its samples.

    export SENSOR_PORT=/dev/ttyUSB0
    bmoe-agent source --model wearable --hook serial_sensor:readings --verified serial_sensor:on_verified --local

The sensor sends one line a sample, six numbers with commas between. A line that is none is left out. For a sensor on an
I2C bus, replace `samples` by a loop that reads its registers; the rest stays as it is.
"""

from __future__ import annotations

import os
import termios
from collections.abc import Generator, Iterator

import numpy as np

CHANNELS, LENGTH = 6, 100
LINE_MAX = 256


def open_port(path: str, speed: int = termios.B115200) -> int:
    """A serial line without echo or translation, as a file descriptor."""
    port = os.open(path, os.O_RDWR | os.O_NOCTTY)
    settings = termios.tcgetattr(port)
    settings[0] = settings[1] = settings[3] = 0  # no translation in, none out, no echo and no line editing
    settings[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    settings[4] = settings[5] = speed
    settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0  # a read waits for one byte, and no longer
    termios.tcsetattr(port, termios.TCSANOW, settings)
    return port


def samples(port: int) -> Iterator[list[float]]:
    """One list of six numbers for each good line; ends when the line is closed."""
    waiting = b""
    while True:
        try:
            data = os.read(port, 4096)
        except OSError:  # the adapter was pulled out
            return
        if not data:
            return
        *lines, waiting = (waiting + data).split(b"\n")
        waiting = waiting[-LINE_MAX:]
        for line in lines:
            try:
                sample = [float(part) for part in line.split(b",")]
            except ValueError:
                continue
            if len(sample) == CHANNELS and np.isfinite(sample).all():
                yield sample


def readings() -> Generator[dict, object, None]:
    """Yield each window of LENGTH samples, and print what comes back."""
    port = open_port(os.environ["SENSOR_PORT"])
    window: list[list[float]] = []
    try:
        for sample in samples(port):
            window.append(sample)
            if len(window) == LENGTH:
                answer = yield {"window": np.array(window, np.float32).T[np.newaxis]}  # (1, 6, 100)
                window = []
                show(answer)
    finally:
        os.close(port)


def on_verified(answer: object) -> None:
    """A window that was answered on this board alone has been verified meanwhile."""
    print("verified later:", "it was wrong" if answer.differs else "it was right", answer.id, flush=True)


def show(answer: object) -> None:
    """What one would act on instead."""
    said = answer.error or f"class {answer.outputs['probabilities'].argmax()}, {answer.assurance}"
    print(answer.id, said, flush=True)
