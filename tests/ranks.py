"""Real processes that talk over gloo, for tests of what several ranks do together."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has all of it imported and forks: a spawned process would import it anew, and pytest's own has threads.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["pytest", "torch.distributed", "torch._dynamo", "metricface.training.loop"])
SECONDS = 120


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of so many gloo processes, in rank order.

    work: a function of a module, as processes find it by name. It returns what torch.save takes. Raises RuntimeError
    with the tracebacks of the ranks that failed, or did not end within two minutes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [START.Process(target=_run, args=(folder, r, ranks, work, arguments)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        for process in processes:
            process.kill()  # those that still wait for another
        failed = [f"rank {r}: {_fault(folder, r)}" for r in range(ranks) if not (folder / f"{r}.pt").exists()]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(ranks)]


def _run(folder: Path, rank: int, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=SECONDS // 2),
        )
        found = work(*arguments)
        dist.barrier()
        part = folder / f"{rank}.part"
        torch.save(found, part)
        part.rename(folder / f"{rank}.pt")
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fault(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.txt"
    return path.read_text() if path.exists() else "did not end"
