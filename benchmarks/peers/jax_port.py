"""Training against the public JAX port of Megalodon (`megalodon-jax` of the package index), equal sizes.

The port runs its own loss under jit with AdamW of optax; ours is eager. Not here: our step (train.py).
"""

from collections.abc import Callable
from functools import partial

from megalodon.model.megalodon import ModelConfig
from megalodon.training.optim import OptimConfig
from sizes import Size, check_equal, scaled
from timing import Contest, Ratio, Side
from train import our_step

TARGETS = {2048: 1.5, 4096: 2.5}
"""What the speed of ours must be over that of the port."""


def entries(smoke: bool) -> dict[str, Callable[[], Contest]]:
    """Key -> what builds its contest."""
    return {
        f"jax/8M/{length}": partial(_against_port, *scaled("8M", length, smoke), least)
        for length, least in TARGETS.items()
    }


def _against_port(size: Size, length: int, least: float) -> Contest:
    sides = {"ours": Side(our_step(size, length), length), "JAX port": Side(step(size.ours, length), length)}
    figures = [Ratio("speed over the JAX port", *sides, at_least=least)]
    return Contest(sides, figures)


def step(config: ModelConfig, length: int) -> Callable[[], None]:
    """A jitted training step on one row of random tokens, with the sizes and the optimizer of ours.

    Raises: ValueError if the port does not have our parameters within 2 %.
    """
    import equinox as eqx
    import jax
    import optax
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM

    names = ("vocab_size", "model_dim", "num_layers", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim")
    options = ("cema_ndim", "chunk_size", "norm_num_groups", "norm_eps", "swiglu")
    sizes = MegalodonConfig(**{name: getattr(config, name) for name in (*names, *options)})
    check_equal(config.num_parameters(), sizes.parameter_count_breakdown()["total"], "megalodon-jax")
    key = jax.random.PRNGKey(0)
    tokens = jax.random.randint(key, (1, length), 0, config.vocab_size)
    ours = OptimConfig()
    optimizer = optax.adamw(ours.lr, *ours.betas, eps=ours.eps, weight_decay=ours.weight_decay)
    model = MegalodonForCausalLM(sizes, key=key)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def update(model, state):  # type: ignore[no-untyped-def]
        gradient = eqx.filter_grad(lambda m: m.compute_loss(tokens, tokens))(model)
        changes, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, changes), state

    def run() -> None:
        nonlocal model, state
        model, state = jax.block_until_ready(update(model, state))

    return run
