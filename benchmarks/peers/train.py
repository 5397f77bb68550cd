"""Training: a step of ours against a step of Llama, of equal parameters, on one row of random tokens.

A step is forward, loss, backward and AdamW, as a user writes it with the public API of each side; both optimizers are
that of the trainer, with its default values. Not here: the counting of operations (sizes.py), the JAX port
(jax_port.py), what a model learns.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import hugging_face
from megalodon.model.loss import loss_sums
from megalodon.model.megalodon import Megalodon
from megalodon.training.execution import compile_model
from megalodon.training.optim import OptimConfig, build_optimizer
from sizes import Size, llama_flops, ours_flops, scaled
from timing import Contest, Ratio, Side, constant

Build = Callable[[], Contest]
MATMUL = 2048
"""Side of the square matrices whose product is called the machine's peak; 1024 to 4096 differ by 5 % on two AVX-512
cores."""
FLAT = (2048, 8192, 65_536)
"""Lengths at which a token must cost the same."""
BETWEEN = (4096, 8192)
"""Lengths of the picture that have no target."""
TARGETS = {("8M", 2048): 1.15, ("8M", 16_384): 3.0, ("50M", 2048): 1.05, ("50M", 16_384): 2.2}
"""What the speed of ours must be over that of Llama."""


def entries(smoke: bool) -> dict[str, Build]:
    """Key -> what builds its contest."""
    found: dict[str, Build] = {}
    for (name, length), least in TARGETS.items():
        key, job = f"train/{name}/{length}", scaled(name, length, smoke)
        found[f"{key}/eager"] = partial(_against_llama, *job, least)
        found[f"{key}/compiled"] = partial(_compiled, *job, least)
        if length == FLAT[0]:
            found[f"{key}/bf16"] = partial(_bf16, *job)
    for length in BETWEEN:
        found[f"train/8M/{length}/eager"] = partial(_against_llama, *scaled("8M", length, smoke), None)
    found["train/8M/flat"] = partial(_flat, [scaled("8M", length, smoke) for length in FLAT])
    return found


def our_step(size: Size, length: int, *, bf16: bool = False, compiled: bool = False) -> Callable[[], None]:
    """A training step of ours as a function without arguments."""
    model = Megalodon(size.ours)
    if compiled:
        compile_model(model, True, torch.device("cpu"))
    tokens = torch.randint(size.ours.vocab_size, (1, length + 1))

    def loss() -> Tensor:
        hidden, _ = model.hidden(tokens[:, :-1])
        return loss_sums(hidden, model.output_weight, tokens[:, 1:]).objective / length

    return _step(model, loss, bf16)


def llama_step(size: Size, length: int, *, bf16: bool = False, compiled: bool = False) -> Callable[[], None]:
    """The same of Llama, whose model computes its loss itself."""
    model = hugging_face.build(size.llama, size.ours.num_parameters()).train()
    # As a whole it is slower than eager (8 M, 2,048 tokens, two cores: 1.12 s against 0.94 s; by layers 0.87 s).
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False)
    tokens = torch.randint(size.llama.vocab_size, (1, length))
    return _step(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, bf16)


def _step(model: nn.Module, loss: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
    optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _matmul() -> Side:
    a, b, out = (torch.randn(MATMUL, MATMUL) for _ in range(3))
    times = 4  # one product takes a tenth of a second, a step a second or more
    return Side(lambda: [torch.mm(a, b, out=out) for _ in range(times)], times * 2.0 * MATMUL**3)


def _against_llama(size: Size, length: int, least: float | None) -> Contest:
    sides = {
        "ours": Side(our_step(size, length), length),
        "Llama": Side(llama_step(size, length), length),
        "matmul": _matmul(),
    }
    share = 0.55 if length == FLAT[0] and least else None
    figures = [
        Ratio("speed over Llama", "ours", "Llama", at_least=least),
        Ratio(
            "ours: share of the matmul peak", "ours", "matmul", share, scale=ours_flops(size.ours, length), percent=True
        ),
        Ratio(
            "Llama: share of the matmul peak", "Llama", "matmul", scale=llama_flops(size.llama, length), percent=True
        ),
    ]
    allowed = llama_flops(size.llama, length) / ours_flops(size.ours, length)
    constants = [constant("operations a token, Llama over ours", allowed)]
    return Contest(sides, figures, constants, units={"matmul": "FLOP/s"})


def _compiled(size: Size, length: int, least: float) -> Contest:
    """Both sides as torch.compile makes them: ours by the trainer's own option, Llama layer by layer."""
    sides = {
        "ours, compiled": Side(our_step(size, length, compiled=True), length),
        "Llama, compiled": Side(llama_step(size, length, compiled=True), length),
    }
    return Contest(sides, [Ratio("compiled: speed over Llama, compiled", *sides, at_least=least)])


def _bf16(size: Size, length: int) -> Contest:
    """Matrix products in bfloat16 by autocast, on both sides, and ours in float32 beside them."""
    sides = {
        "ours, bf16": Side(our_step(size, length, bf16=True), length),
        "Llama, bf16": Side(llama_step(size, length, bf16=True), length),
        "ours": Side(our_step(size, length), length),
        "Llama": Side(llama_step(size, length), length),
    }
    figures = [
        Ratio("bf16: speed over float32", "ours, bf16", "ours", at_least=1.6),
        Ratio("bf16: speed over Llama, bf16", "ours, bf16", "Llama, bf16"),
        Ratio("Llama, bf16: speed over float32", "Llama, bf16", "Llama"),
    ]
    return Contest(sides, figures)


def _flat(jobs: Sequence[tuple[Size, int]]) -> Contest:
    """Ours alone at growing length: what a token costs."""
    names = [f"{tokens:,} tokens" for _, tokens in jobs]
    sides = {name: Side(our_step(*job), job[1]) for name, job in zip(names, jobs, strict=True)}
    first, *longer = names
    figures = [Ratio(f"cost of a token at {name} over {first}", first, name, at_most=1.10) for name in longer]
    return Contest(sides, figures)
