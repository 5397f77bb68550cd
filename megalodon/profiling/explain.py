"""What binds a row of a profile, in words. Not here: the numbers (timing.py, model_timing.py)."""

from collections.abc import Mapping

from megalodon.profiling.meter import Row


def explain(row: Row, constants: Mapping[str, float]) -> str | None:
    """Return a sentence on what a row could reach on this machine and how far from it it is; None without a floor."""
    if row.floor_ms is None or row.flops is None:
        return None
    over = row.ms / row.floor_ms if row.floor_ms else float("inf")
    compute = row.flops / constants["matmul_tflops"] / 1e9
    memory = (row.bytes or 0) / constants["copy_gb_per_s"] / 1e6
    bound = (
        f"memory: {(row.bytes or 0) / 1e6:,.3g} MB take {memory:.3g} ms at the rate of a copy"
        if memory > compute
        else f"arithmetic: {row.flops / 1e9:,.3g} GFLOP take {compute:.3g} ms at the rate of a matrix product"
    )
    if over < 1:
        verdict = "faster than that: a cache held a part of it"
    elif over <= 2:
        verdict = f"it takes {over:.2f}x of that, near what this machine can do"
    else:
        verdict = f"it takes {over:,.3g}x of that: overhead, more passes over memory, or products below their best rate"
    return f"{row.name} {row.what} {row.sizes}: bound by {bound}; {verdict}"
