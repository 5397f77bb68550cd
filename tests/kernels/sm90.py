"""Compile kernels for an H100 (sm_90) on a machine without a GPU, and read what the machine code needs.

    python tests/kernels/sm90.py cema norm          # one JSON line for each kernel of these ops

A process of its own: Triton decides between interpreter and compiler when a kernel is defined. The kernels and the
tiles they launch with on a GPU stand in PRODUCTION. Not here: what is asked of the figures (test_sm90.py).
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

BF16, F32, F64, I32, I64, BOOL, INT = "*bf16", "*fp32", "*fp64", "*i32", "*i64", "*i1", "i32"


class Production(NamedTuple):
    """A kernel as a GPU runs it at the 7B width.

    `types` gives the Triton type of each argument that is no constexpr; pointers and integers count as multiples of 16.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    uses_tensor_cores: bool = False


def production(op: str) -> list[Production]:
    """The kernels of an op and their tiles."""
    return PRODUCTION[op]()


def _norm() -> list[Production]:
    import triton.language as tl

    common = {"D": 4096, "BLOCK": 4096, "CENTRE": True, "WIDE": tl.float32}
    pointers = {"x_ptr": BF16, "weight_ptr": F32, "mean_ptr": F32, "rstd_ptr": F32, "num_rows": INT}
    forward = pointers | {"y_ptr": BF16, "bias_ptr": F32, "eps": "fp32"}
    backward = pointers | {"dy_ptr": BF16, "dx_ptr": BF16, "dweight_ptr": F32, "dbias_ptr": F32}
    return [
        Production("norm forward", "norm:_forward", forward, common | {"ROWS": 1}, warps=8),
        Production("norm backward", "norm:_backward", backward, common, warps=8),
    ]


def _swiglu() -> list[Production]:
    import triton.language as tl

    common = {"BLOCK": 1024, "WIDE": tl.float32}
    forward = {"a_ptr": BF16, "b_ptr": BF16, "y_ptr": BF16, "size": INT}
    backward = {"dy_ptr": BF16, "a_ptr": BF16, "b_ptr": BF16, "da_ptr": BF16, "db_ptr": BF16, "size": INT}
    return [
        Production("swiglu forward", "swiglu:_forward", forward, common),
        Production("swiglu backward", "swiglu:_backward", backward, common),
    ]


def _decode() -> list[Production]:
    import triton.language as tl

    state = {"count_ptr": I64, "mean_ptr": F64, "var_ptr": F64, "scale_ptr": F32, "bias_ptr": F32, "h_ptr": F32}
    given = {name: F32 for name in ("p_ptr", "q_ptr", "gamma_ptr", "omega_ptr")}
    move = state | given | {"x_ptr": BF16, "u_ptr": BF16, "ema_ptr": BF16, "eps": "fp32"}
    sizes = {"D": 4096, "SIZE": 64, "N": 16, "WIDTH": 64, "STATES": 16, "WIDE": tl.float32}
    attention = {"slot_ptr": I64, "cache_ptr": BF16, "scores_ptr": F32}
    common = {"H": 4, "C": 4096, "KEYS": 64, "WIDE": tl.float32}
    return [
        Production("decode norm and cema", "decode:_norm_cema", move, sizes),
        Production(
            "decode scores",
            "decode:_scores",
            attention | {"q_ptr": BF16, "k_ptr": BF16},
            common | {"Z": 256, "WIDTH": 256},
        ),
        Production(
            "decode values",
            "decode:_values",
            attention | {"v_ptr": BF16, "y_ptr": BF16},
            common | {"V": 2048, "PLACES": 4096, "SLICE": 64},
        ),
    ]


def _timestep_norm() -> list[Production]:
    import triton.language as tl

    tile = {"G": 64, "WIDTH": 64, "STEPS": 64, "GROUPS": 1, "WIDE": tl.float32}
    merge = {"G": 64, "TILES": 256, "GROUPS": 1}
    starts, sizes = {"starts_ptr": BOOL}, {"L": INT, "tiles": INT}
    sums = {"begins_ptr": I32, "length_ptr": I32, "mean_ptr": F64, "spread_ptr": F64}
    state = {"count0_ptr": I64, "mean0_ptr": F64, "var0_ptr": F64}
    before = {"before_count_ptr": I64, "before_mean_ptr": F64, "before_var_ptr": F64}
    final = {"final_count_ptr": I64, "final_mean_ptr": F64, "final_var_ptr": F64}
    steps = {"x_ptr": BF16, "weight_ptr": F32, "mean_ptr": F64, "rstd_ptr": F32, "count_ptr": I64} | sizes
    apply = steps | before | {"bias_ptr": F32, "y_ptr": BF16, "eps": "fp32"}
    tile_gradients = {"begins_ptr": I32, "a_ptr": F64, "b_ptr": F64, "c_ptr": F64}
    behind = {"behind_a_ptr": F64, "behind_b_ptr": F64, "behind_c_ptr": F64}
    merge_gradients = tile_gradients | behind | state | starts | sizes | {"final_count_ptr": I64, "final_mean_ptr": F64}
    merge_gradients |= {"dmean_ptr": F64, "dvar_ptr": F64, "dmean0_ptr": F64, "dvar0_ptr": F64}
    gradients = steps | behind | {"dy_ptr": BF16, "dx_ptr": BF16, "dweight_ptr": F32, "dbias_ptr": F32}
    kernels = [
        ("tiles, packed", "_sum_tiles", {"x_ptr": BF16} | sums | starts | sizes, tile),
        ("merge", "_merge_tiles", sums | state | before | final | {"tiles": INT}, merge),
        ("apply", "_apply", apply, tile),
        ("apply, packed", "_apply", apply | starts, tile),
        ("tile gradients, packed", "_sum_tile_gradients", steps | tile_gradients | {"dy_ptr": BF16} | starts, tile),
        ("merge gradients", "_merge_tile_gradients", merge_gradients, merge),
        ("apply gradients", "_apply_gradients", gradients, tile),
        ("apply gradients, packed", "_apply_gradients", gradients | starts, tile),
    ]
    two_warps = ("_sum_tiles", "_apply", "_sum_tile_gradients")
    return [
        Production(f"timestep_norm {name}", f"timestep_norm:{kernel}", types, tiles, 2 if kernel in two_warps else 4)
        for name, kernel, types, tiles in kernels
    ]


def _chunk_attention() -> list[Production]:
    """One head of 256 query and 2,048 value features."""
    import triton.language as tl

    from megalodon_kernels.chunk_attention.kernel import tiles

    t, H, Z, V = tiles(torch.bfloat16), 4, 256, 2048
    common = {"H": H, "TILE": t.tile, "WIDE": tl.float32}
    sizes = {"L": INT, "S": INT}
    slab = sizes | {"RING": INT, "tiles_a_head": INT, "first_tile": INT, "begin_ptr": I32}
    score = slab | {"q_ptr": BF16, "k_ptr": BF16, "lse_ptr": F32, "weights_ptr": BF16}
    d_score = slab | {"do_ptr": BF16, "v_ptr": BF16, "weights_ptr": BF16, "delta_ptr": F32, "ds_ptr": BF16}
    mix = slab | {"weights_ptr": BF16, "x_ptr": BF16, "end_ptr": I32, "out_ptr": BF16}
    gated = mix | {"gate_ptr": BF16, "mixed_ptr": BF16}
    collect = {name: type_ for name, type_ in mix.items() if name != "first_tile"} | {"first_head": INT}
    ungate = dict.fromkeys(("dy_ptr", "mixed_ptr", "gate_ptr", "do_ptr", "dgate_ptr"), BF16) | {
        "delta_ptr": F32,
        "num_rows": INT,
    }
    inner, outer = common | {"KEYS": t.keys, "STEP": t.step}, common | {"COLUMNS": t.columns, "STEP": t.step}
    log_sum_exp = {"q_ptr": BF16, "k_ptr": BF16, "begin_ptr": I32, "lse_ptr": F32} | sizes
    pipelined = {"warps": t.warps, "stages": t.stages, "uses_tensor_cores": True}
    return [
        Production("attention lse", "chunk_attention:_log_sum_exp", log_sum_exp, common | {"Z": Z, "STEP": t.lse_step},
                   warps=t.warps, uses_tensor_cores=True),
        Production("attention P", "chunk_attention:_score", score, inner | {"Z": Z}, **pipelined),
        Production("attention dS", "chunk_attention:_d_score", d_score, inner | {"V": V}, **pipelined),
        Production("attention P v and gate", "chunk_attention:_mix", gated, outer | {"WIDTH": V}, **pipelined),
        Production("attention dq", "chunk_attention:_mix", mix, outer | {"WIDTH": Z}, **pipelined),
        Production("attention dk", "chunk_attention:_collect", collect, outer | {"WIDTH": Z}, **pipelined),
        Production("attention dv", "chunk_attention:_collect", collect, outer | {"WIDTH": V}, **pipelined),
        Production("attention gate backward", "chunk_attention:_ungate", ungate,
                   {"WIDTH": V, "BLOCK": V, "ROWS": 1, "WIDE": tl.float32}, warps=8),
    ]  # fmt: skip


def _qk_rope() -> list[Production]:
    import triton.language as tl

    common = {"Z": 1024, "SIZE": 256, "BLOCK": 256, "WIDE": tl.float32}
    pointers = {"z_ptr": BF16, "gamma_ptr": F32, "turn_ptr": F32, "num_tokens": INT, "num_turns": INT}
    pointers |= {"eps": "fp32", "shrink": "fp32"}
    forward = pointers | {"beta_ptr": F32, "q_ptr": BF16, "k_ptr": BF16}
    backward = pointers | {"dq_ptr": BF16, "dk_ptr": BF16, "dz_ptr": BF16, "d_gamma_ptr": F32, "d_beta_ptr": F32}
    return [
        Production("qk_rope forward", "qk_rope:_forward", forward, common | {"ROWS": 8}, warps=8),
        Production("qk_rope backward", "qk_rope:_backward", backward, common | {"ROWS": 4}, warps=4),
    ]


def _linear_cross_entropy() -> list[Production]:
    import triton.language as tl

    common = {"V": 32_000, "BLOCK": 4096, "GRADIENT": True, "IGNORED": -100, "WIDE": tl.float32}
    types = {"logits_ptr": BF16, "targets_ptr": I64, "losses_ptr": F32, "log_z_ptr": F32, "z_loss": "fp32"}
    return [Production("linear_cross_entropy", "linear_cross_entropy:_softmax", types, common, warps=8)]


def _cema() -> list[Production]:
    import triton.language as tl

    from megalodon_kernels.cema.kernel import BLOCK, ROW, SUMS, WALK

    shape = {"D": 4096, "N": 16, "BN": 16, "T": ROW, "WIDE": tl.float32}
    common = {n: F32 for n in ("p_ptr", "powers_ptr")} | {"length": INT, "num_slots": INT}
    walk = common | {n: F32 for n in ("h0_ptr", "last_ptr", "gamma_ptr", "k_ptr")} | {"x_ptr": BF16, "y_ptr": BF16}
    sums = common | {n: F32 for n in ("h0_ptr", "d_last_ptr", "sums_ptr", "d_omega_ptr")}
    sums |= {n: BF16 for n in ("x_ptr", "dy_ptr", "states_ptr")}
    packed = {"table_ptr": I32, "num_rows_ptr": I32}

    def tile(of: Any) -> dict[str, Any]:
        return shape | {"BD": of.channels, "M": of.boundaries, "SPLIT": True}

    found = []
    for name, extra in (("", {}), (", packed", packed)):
        forward, backward = tile(WALK[16]) | {"REVERSED": False}, tile(WALK[16]) | {"REVERSED": True}
        warps = {"warps": WALK[16].warps, "stages": 1, "uses_tensor_cores": True}
        found += [
            Production(f"cema forward{name}", "cema:walk", walk | extra, forward, **warps),
            Production(f"cema dx{name}", "cema:walk", walk | extra | {"states_ptr": BF16}, backward, **warps),
            Production(
                f"cema sums{name}", "cema:parameter_sums", sums | extra, tile(SUMS[16]), SUMS[16].warps, 1, True
            ),
        ]
    tables = {n: F32 for n in ("p_ptr", "gamma_ptr", "omega_ptr", "powers_ptr", "k_ptr")}
    tables |= {"log2_decay_ptr": F64, "turns_ptr": F64}
    last = {n: F32 for n in ("sums_ptr", "d_last_ptr", "p_ptr", "gamma_ptr", "powers_ptr", "d_p_ptr", "d_gamma_ptr")}
    last |= {"d_log_decay_ptr": F64, "d_angle_ptr": F64, "batch": INT}
    return [
        *found,
        Production("cema tables", "cema:tables", tables, shape),
        Production("cema parameters", "cema:parameter_gradients", last, shape | {"BLOCK": BLOCK}),
    ]


PRODUCTION = {
    "norm": _norm,
    "swiglu": _swiglu,
    "decode": _decode,
    "timestep_norm": _timestep_norm,
    "chunk_attention": _chunk_attention,
    "qk_rope": _qk_rope,
    "linear_cross_entropy": _linear_cross_entropy,
    "cema": _cema,
}


def measure(wanted: Production) -> dict[str, Any]:
    """Compile; return registers a thread, bytes of stack and spills, shared memory, and instruction counts."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = wanted.kernel.split(":")
    kernel = getattr(importlib.import_module(f"megalodon_kernels.{module}.kernel"), function)
    signature = {name: wanted.types.get(name, "constexpr") for name in kernel.arg_names}
    missing = set(wanted.types) - set(kernel.arg_names)
    assert not missing, f"{wanted.name}: {kernel.__name__} has no argument {missing}"
    constants = {
        (i,): wanted.constants.get(name) for i, name in enumerate(kernel.arg_names) if name not in wanted.types
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if wanted.types.get(name, "").startswith(("*", "i"))
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": wanted.warps, "num_stages": wanted.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(binary))
        code = _tool("nvdisasm", "-c", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    return {
        "name": wanted.name,
        "uses_tensor_cores": wanted.uses_tensor_cores,
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(op in ("LDL", "STL") for op in instructions),
        "shared": compiled.metadata.shared,
        "instructions": len(instructions),
        "tensor_core": sum(op in ("HGMMA", "HMMA", "WGMMA") for op in instructions),
    }


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for op in sys.argv[1:]:
        for wanted in production(op):
            sys.stdout.write(json.dumps(measure(wanted)) + "\n")
            sys.stdout.flush()
