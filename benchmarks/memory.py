"""Peak memory of a call, for the benchmarks."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def _resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_of(run: Callable[[], Any]) -> float:
    """Peak memory of a call in MiB, beyond what was there before."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], _resident())

    gc.collect()
    before = _resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak[0] - before


def peak_in_process(measure: Callable[..., None], *arguments: Any) -> float:
    """What ``measure(*arguments, queue)`` puts into its queue, run in a fresh process."""
    context = get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak
