"""Devices a run can be planned for without having one: their memory, speed and links.

    device = device_spec("h100")

Numbers are those of the vendor's data sheets, without sparsity, and count as assumed; those of this machine's CPU and
GPU are measured. Not here: what a run makes of them (plan.py).
"""

import difflib
import os
from typing import NamedTuple

import torch

from megalodon.errors import InputError
from megalodon.training.memory import available_memory
from megalodon.training.metrics import matmul_peak
from megalodon.training.plan import device_named
from megalodon_kernels.dispatch import Card

GIB = 2**30
NETWORK = 50e9
"""Bytes/s of a device to other nodes, each way: one InfiniBand NDR link of 400 Gbit/s a device, as in an HGX node."""


class DeviceSpec(NamedTuple):
    """What a plan asks of a device."""

    name: str
    title: str
    memory: int
    """Bytes. Data sheets say GB where the chips hold GiB."""
    bf16: float
    """Floating-point operations/s of matrix products, with sums in float32."""
    fp32: float
    link: float
    """Bytes/s to the other devices of a node, each way."""
    node: int
    """Devices of a node."""
    network: float
    """Bytes/s to another node, each way."""
    reserve: int
    """Bytes that a process takes before any tensor; assumed."""
    efficiency: float
    """Part of the speed of a matrix product that a step reaches; assumed."""
    card: Card | None
    """What the kernels ask; None for a CPU."""
    measured: bool
    """Memory and speed were measured here."""
    source: str
    """Where the numbers are from."""


def _gpu(
    name: str, title: str, memory: int, bf16: float, fp32: float, link: float, node: int, card: Card, source: str
) -> DeviceSpec:
    sheet = f"{source}, dense"
    return DeviceSpec(
        name, title, memory * GIB, bf16 * 1e12, fp32 * 1e12, link * 1e9, node, NETWORK, GIB, 0.4, card, False, sheet
    )


_AMPERE, _HOPPER, _BLACKWELL = Card((8, 0), 163 << 10), Card((9, 0), 227 << 10), Card((10, 0), 227 << 10)
_GA102, _ADA = Card((8, 6), 99 << 10), Card((8, 9), 99 << 10)
DEVICES = {
    spec.name: spec
    for spec in (
        _gpu("a100-40", "NVIDIA A100 SXM 40 GB", 40, 312, 19.5, 300, 8, _AMPERE, "NVIDIA A100 data sheet"),
        _gpu("a100-80", "NVIDIA A100 SXM 80 GB", 80, 312, 19.5, 300, 8, _AMPERE, "NVIDIA A100 data sheet"),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 80, 989, 67, 450, 8, _HOPPER, "NVIDIA H100 data sheet"),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 141, 989, 67, 450, 8, _HOPPER, "NVIDIA H200 data sheet"),
        _gpu("b200", "NVIDIA B200 SXM 180 GB", 180, 2250, 75, 900, 8, _BLACKWELL, "NVIDIA HGX B200 data sheet"),
        _gpu("l40s", "NVIDIA L40S 48 GB", 48, 362, 91.6, 32, 8, _ADA, "NVIDIA L40S data sheet"),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", 24, 71, 35.6, 32, 2, _GA102, "NVIDIA GA102 white paper"),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 24, 165, 82.6, 32, 2, _ADA, "NVIDIA Ada white paper"),
    )
}
"""Well-known devices by name."""
NAMES = ("auto", "cpu", "cuda", *DEVICES)
SHORT = {"a100": "a100-80", "h100-80": "h100", "rtx-3090": "rtx3090", "rtx-4090": "rtx4090", "3090": "rtx3090"}
SHORT |= {"4090": "rtx4090"}
CPU_EFFICIENCY = 0.5
"""What books-tiny reaches on two quiet AVX-512 cores (`peak_share` of metrics.jsonl)."""


def device_spec(name: str) -> DeviceSpec:
    """Return what is known of a device: auto, cpu and cuda[:N] of this machine, or one by name.

    Raises: InputError with the nearest name; EnvironmentFault for a GPU of this machine that is not there.
    """
    plain = name.lower().replace("_", "-").replace(" ", "-")
    plain = SHORT.get(plain, plain)
    if plain in DEVICES:
        return DEVICES[plain]
    if plain not in ("auto", "cpu") and not plain.startswith("cuda"):
        near = difflib.get_close_matches(plain, NAMES, 1, 0.5)
        meant = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"--device {name}: no such device; {meant}known: {', '.join(NAMES)}")
    device = device_named(plain)
    return this_cpu() if device.type == "cpu" else this_gpu(device)


def reserve(*, gpu: bool) -> int:
    """Return what a process takes beside the tensors of a step, assumed: libraries, data, on a GPU the context.

    Of a CPU it is what `pretrain quickstart --dry-run` leaves unexplained.
    """
    return GIB if gpu else GIB * 6 // 10


def this_cpu() -> DeviceSpec:
    """Measure this machine: its free memory and the speed of a matrix product, a quarter of a second."""
    speed = matmul_peak(torch.device("cpu"), torch.float32)
    memory = available_memory(torch.device("cpu")) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    title = f"this machine, {torch.get_num_threads()} threads"
    source = "free memory, a product of 1024 x 1024 in float32"
    link, alone = 2e9, 1 << 30  # processes of one machine exchange through its memory
    room = reserve(gpu=False)
    return DeviceSpec("cpu", title, memory, speed, speed, link, alone, link, room, CPU_EFFICIENCY, None, True, source)


def this_gpu(device: torch.device) -> DeviceSpec:
    """Measure a GPU of this machine; its links are those of the data sheet where its name is known."""
    properties = torch.cuda.get_device_properties(device)
    card = Card(torch.cuda.get_device_capability(device), properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    plain = properties.name.lower().replace(" ", "")
    known = next((spec for name, spec in DEVICES.items() if name.partition("-")[0] in plain), DEVICES["l40s"])
    bf16, fp32 = (matmul_peak(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    source = f"memory, a product of 4096 x 4096; links as of {known.title}"
    return known._replace(
        name=str(device), title=properties.name, memory=properties.total_memory, bf16=bf16, fp32=fp32, card=card,
        measured=True, source=source,
    )  # fmt: skip
