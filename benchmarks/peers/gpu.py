"""On a CUDA device: the ops at 7B width against what else computes the like, forward passes in bfloat16.

CEMA against the FFT formulation, Mamba-2 (mamba_ssm) and HGRN (fla, flash-linear-attention) on as many tokens and
channels; attention in chunks against slices of the values through scaled_dot_product_attention. What is not installed
is named and left out. Not here: parity, floors and shares of the peak (make gpu-check), what was predicted (goals.py).
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import cema
from megalodon_kernels import chunk_attention
from timing import Contest, Ratio, Side

LENGTH, DIM, STATES = 32_768, 4096, 16
CHUNK, HEADS, KEY_DIM, VALUE_DIM = 4096, 4, 256, 2048
CALLS = 20
"""In a turn: a forward pass takes less than a millisecond."""
NEEDS = {"gpu/cema/mamba2": "mamba_ssm", "gpu/cema/hgrn": "fla"}


def entries(smoke: bool) -> dict[str, Callable[[], Contest]]:
    """Key -> what builds its contest. A smoke test has the same sizes: they are what is compared."""
    return {
        "gpu/cema/fft": _cema_against_fft,
        "gpu/cema/mamba2": _cema_against_mamba2,
        "gpu/cema/hgrn": _cema_against_hgrn,
        "gpu/attention/sdpa": _attention_against_slices,
    }


def lacking() -> dict[str, str]:
    """Key -> why it cannot be measured here."""
    if not torch.cuda.is_available():
        return dict.fromkeys(entries(False), "there is no CUDA device")
    return {key: f"{name} is not installed" for key, name in NEEDS.items() if importlib.util.find_spec(name) is None}


def _calls(run: Callable[[], object], calls: int = CALLS) -> Side:
    def turn() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                run()
        torch.cuda.synchronize()

    return Side(turn, LENGTH * calls)


def _coefficients() -> cema.Inputs:
    inputs = cema.Inputs(*(value.detach().cuda() for value in cema.draw(LENGTH, DIM, STATES)))
    return inputs._replace(x=inputs.x.bfloat16())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _cema_against_fft() -> Contest:
    inputs = _coefficients()
    wide = inputs._replace(x=inputs.x.float())
    sides = {"ours": _calls(lambda: cema.our_cema(*inputs)), "FFT": _calls(lambda: cema.cema_by_fft(*wide), 1)}
    return Contest(sides, [Ratio("CEMA forward: speed over the FFT formulation", *sides, at_least=25)])


def _cema_against_mamba2() -> Contest:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs, width = _coefficients(), 64
    x, decay = _random(1, LENGTH, DIM // width, width), -torch.ones(DIM // width, device="cuda")
    step = torch.rand(1, LENGTH, DIM // width, device="cuda").bfloat16()
    into, out = _random(1, LENGTH, 1, 2 * STATES), _random(1, LENGTH, 1, 2 * STATES)
    sides = {
        "ours": _calls(lambda: cema.our_cema(*inputs)),
        "Mamba-2": _calls(lambda: mamba_chunk_scan_combined(x, step, decay, into, out, chunk_size=256)),
    }
    return Contest(sides, [Ratio("CEMA forward: speed over the scan of Mamba-2", *sides)])


def _cema_against_hgrn() -> Contest:
    from fla.ops.hgrn import chunk_hgrn

    inputs = _coefficients()
    x, gate = _random(1, LENGTH, DIM), -torch.rand(1, LENGTH, DIM, device="cuda").bfloat16()
    sides = {"ours": _calls(lambda: cema.our_cema(*inputs)), "HGRN": _calls(lambda: chunk_hgrn(x, gate))}
    return Contest(sides, [Ratio("CEMA forward, 16 complex states: speed over HGRN, 1 real state", *sides)])


def _attention_against_slices() -> Contest:
    """Flash attention takes heads of at most 256: the values go through in slices, each with its own softmax."""
    q, k = _random(1, LENGTH, HEADS, KEY_DIM) / 16, _random(1, LENGTH, HEADS, KEY_DIM)
    v = _random(1, LENGTH, HEADS, VALUE_DIM)
    cut = [t.view(-1, CHUNK, HEADS, t.shape[-1]).transpose(1, 2).contiguous() for t in (q, k, v)]
    slices = cut[2].split(KEY_DIM, dim=-1)

    def by_slices() -> list[Tensor]:
        return [scaled_dot_product_attention(cut[0], cut[1], s, is_causal=True, scale=1.0) for s in slices]

    sides = {
        "ours": _calls(lambda: chunk_attention(q, k, v, CHUNK)),
        "SDPA, slices": _calls(by_slices),
    }
    return Contest(sides, [Ratio("attention forward: speed over slices by SDPA", *sides, at_least=1.7)])
