"""Run a function on several ranks: processes that are started once and stay. Not here: what they compute.

    results = on_ranks(2, function, *arguments)      # function(*arguments) on each; its results, by rank

`function` is a plain one of a test file; ranks meet over gloo. Tests of a size share their processes.
"""

import atexit
import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE = 120
"""Seconds that a function may take on a machine that is busy with other things."""
_pools: dict[int, "_Pool"] = {}


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what the function returned on each rank. Raises: AssertionError with the traceback of each that failed."""
    pool = _pools.pop(ranks, None) or _Pool(ranks)
    results = pool.run(inspect.getfile(function), function.__name__, arguments)  # a pool that failed is not kept
    _pools[ranks] = pool
    return results


class _Pool:
    def __init__(self, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.meeting = tempfile.mkdtemp(prefix="ranks-")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self.meeting, rank, ranks), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)
        atexit.register(self.close)

    def run(self, file: str, name: str, arguments: tuple[Any, ...]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((file, name, arguments))
        until, found = time.monotonic() + PATIENCE, []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} of {len(self.pipes)} took more than {PATIENCE} s in {name}; {found}")
            found.append(pipe.recv())
        faults = [f"rank {rank}:\n{fault}" for rank, (fault, _) in enumerate(found) if fault]
        if faults:
            self.close()
            raise AssertionError("\n".join(faults))
        return [result for _, result in found]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _work(pipe: Any, meeting: str, rank: int, ranks: int) -> None:
    """What each process does until it is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{meeting}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE / 2))
    while True:
        file, name, arguments = pipe.recv()
        try:
            spec = importlib.util.spec_from_file_location(Path(file).stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            torch.manual_seed(0)
            answer = None, getattr(module, name)(*arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)
