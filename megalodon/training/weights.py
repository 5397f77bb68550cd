"""The weights of a run, with optimizer and averages: what this process has of them, and the whole.

    weights = Weights(model_config, plan, ranks, build)
    weights.model, weights.optimizer, weights.average        # this rank's parts of them, if there are several ranks
    load_tensors(saved, weights.live(), weights.places())    # what a checkpoint holds
    tensors, share = weights.saved()                         # what this rank writes of one

Not here: how a model is spread (megalodon/parallel), the step (loop.py), files (megalodon/checkpoint).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from megalodon.checkpoint.store import Share
from megalodon.checkpoint.tensor_files import form_of
from megalodon.model.adapters import is_adapted, trainable
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, build_model
from megalodon.model.megalodon import Megalodon, ModelConfig, initial_value
from megalodon.model.weights import allocate
from megalodon.parallel.ranks import Piece, Ranks
from megalodon.training.execution import recompute
from megalodon.training.optim import (
    AveragedWeights,
    build_optimizer,
    nonfinite_gradients,
    optimizer_tensors,
    parameter_of,
)
from megalodon.training.plan import Plan


class Weights:
    """See above.

    One of several ranks builds its own parts alone, and never the whole; but the baseline, and a model with adapters,
    whose base no checkpoint holds, are built whole and cut.

    Args:
        build: called with every model that was just made; see `Run.build`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        plan: Plan,
        ranks: Ranks,
        build: Callable[[LanguageModel], None] | None = None,
    ) -> None:
        self._config, self._plan, self._ranks, self._build = config, plan, ranks, build
        self._in_parts = not ranks.alone and build is None and isinstance(config, ModelConfig)
        with torch.device("meta") if self._in_parts else nullcontext():
            self.model = self._built()
        if not self._in_parts:
            self.model.to(plan.device)
        recompute(self.model, plan.config.recompute)
        ranks.wrap(self.model, bf16=plan.bf16)
        self.parameters = ranks.parameters(self.model)
        """By name, in the memory of the model: what the optimizer updates."""
        self.optimizer = build_optimizer(self.parameters, plan.optim)
        self.average = None if plan.optim.ema is None else AveragedWeights(self.parameters, plan.optim.ema)

    def _built(self) -> LanguageModel:
        """A whole model with its initial weights."""
        backend: Any = self._plan.config.backend
        model = build_model(self._config, self._plan.config.seed, backend)
        if self._build:
            self._build(model)
        return model

    def _bare(self) -> LanguageModel:
        """A whole model whose parameters are still to be filled."""
        if not self._in_parts:
            return self._built()
        with torch.device("meta"):
            model = self._built()
        allocate(cast(Megalodon, model), torch.device("cpu"))
        return model

    def begin(self, initialise: Callable[[LanguageModel], None] | None) -> None:
        """Give a run at step 0 the weights it starts with; see `Run.initialise`."""
        if initialise is None:
            if self._in_parts:
                config: Any = self._config
                self._take(lambda name, shape: initial_value(name, shape, config, self._plan.config.seed))
        elif self._ranks.alone:
            initialise(self.model)
        else:
            whole = self._bare()
            initialise(whole)
            self._take(lambda name, _: whole.get_parameter(name))
        if self.average:
            self.average.restart()

    @torch.no_grad()
    def _take(self, value: Callable[[str, torch.Size], Tensor]) -> None:
        """Give this rank's parts the values of the whole parameters, each asked for by name and shape and let go."""
        for name, part in self.parameters.items():
            offsets, shape = self._ranks.place(name, part)
            spans = tuple(slice(begin, begin + n) for begin, n in zip(offsets, part.shape, strict=True))
            part.copy_(value(name, torch.Size(shape))[spans])

    def gradients(self) -> dict[str, Tensor]:
        """What the passes of a step left, summed over ranks, by name."""
        return self._ranks.gradients(self.model, self.parameters)

    def drop_gradients(self) -> None:
        """Forget them."""
        for parameter in (*self.parameters.values(), *self.model.parameters()):
            parameter.grad = None

    def nonfinite(self, gradients: Mapping[str, Tensor]) -> dict[str, int]:
        """Parameter -> values of its gradient that are not finite, on all ranks together."""
        names = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        found = nonfinite_gradients(gradients)
        counts = self._ranks.sums([found.get(name, 0) / self._ranks.copies(name) for name in names])
        return {name: round(count) for name, count in zip(names, counts, strict=True) if count}

    def live(self) -> dict[str, Tensor]:
        """Everything that is saved and restored bit by bit; a tied matrix once. Nothing of a frozen model."""
        trained = trainable(self.model)
        tensors: dict[str, Tensor] = {f"model.{name}": self.parameters[name] for name in trained}
        if not is_adapted(self.model):
            kept = self.model.state_dict(keep_vars=True).keys()
            tensors |= {f"model.{name}": b for name, b in self.model.named_buffers() if name in kept}
        averages = self.average.tensors() if self.average else {}
        return tensors | averages | optimizer_tensors(self.optimizer)

    def places(self) -> dict[str, Piece]:
        """Where in the whole each of these lies."""
        return {name: self._ranks.place(parameter_of(name), part) for name, part in self.live().items()}

    def saved(self) -> tuple[dict[str, Tensor], Share | None]:
        """What this process writes of a checkpoint; with several ranks also what it knows of the others' parts.

        Raises: CheckFailed, on every rank, if what several ranks hold in common differs.
        """
        live, team = self.live(), self._ranks.writers
        if team is None:
            return live, None
        self._ranks.at_rest(self.model)
        self._ranks.check_alike(self.parameters)
        places = self.places()
        forms = {name: form_of(tensor, places[name].shape) for name, tensor in live.items()}
        mine = {name: x for name, x in live.items() if self._ranks.writes(parameter_of(name)) and x.numel()}
        return mine, Share(forms, places, team)

    def whole_model(self) -> LanguageModel:
        """The model with all its weights, on the main rank; the others take part and have their own parts."""
        if self._ranks.alone:
            return self.model
        self._ranks.at_rest(self.model)
        made: list[LanguageModel] = []
        self._ranks.from_main(lambda: made.append(self._bare()))  # if it cannot, nobody waits for its part below
        copy = made[0] if made else None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = self._ranks.whole(name, parameter)
                if copy is not None:
                    copy.get_parameter(name).copy_(value)
            for name, buffer in self.model.named_buffers() if copy is not None else ():
                copy.get_buffer(name).copy_(buffer)  # type: ignore[union-attr]
        return self.model if copy is None else copy.to(self._plan.device).eval()
