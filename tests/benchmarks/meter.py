"""Time and peak memory of calls on a device, each cell of a table in a process of its own."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
# What another library is predicted to need beyond this is left out, saying so.
LIMIT = 12 * GIB


class Meter:
    """Time and peak memory of calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _held(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def memory(self, call: Callable[[], Any]) -> int:
        """Bytes held at most during a call, beyond those before it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - before)
        before = self._held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        call()
        return max(0, self._held("VmHWM") - before)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of up to 9 calls, fewer of slow ones."""
        found: list[float] = []
        while len(found) < 9 and sum(found) < 6.0:
            found.append(self.once(call))
        return statistics.median(found)

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        since = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - since

    def both(self, call: Callable[[], Any]) -> tuple[float, int]:
        """Seconds and bytes."""
        memory = self.memory(call)
        return self.seconds(call), memory
