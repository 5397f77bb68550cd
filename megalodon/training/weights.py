"""The weights of a run, with optimizer and averages: what this process has of them, and the whole.

    weights = Weights(model_config, plan, ranks, build)
    weights.model, weights.optimizer, weights.average        # this rank's parts of them, if there are several ranks
    load_tensors(saved, weights.live(), weights.places())    # what a checkpoint holds
    tensors = weights.whole()                                # the same, whole, on the main rank

Not here: how a model is spread (megalodon/parallel), the step (loop.py), files (megalodon/checkpoint).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megalodon.model.adapters import is_adapted, trainable
from megalodon.model.architectures import LanguageModel, LanguageModelConfig, build_model
from megalodon.parallel.ranks import Ranks
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

    Args:
        build: called with every model that was just made; see `Run.build`.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        plan: Plan,
        ranks: Ranks,
        build: Callable[[LanguageModel], None] = lambda model: None,
    ) -> None:
        self._config, self._plan, self._ranks, self._build = config, plan, ranks, build
        self.model = self._built().to(plan.device)
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
        self._build(model)
        return model

    def begin(self, initialise: Callable[[LanguageModel], None]) -> None:
        """Give a run at step 0 the weights it starts with; see `Run.initialise`."""
        if self._ranks.alone:
            initialise(self.model)
        else:
            whole = self._built()
            initialise(whole)
            with torch.no_grad():
                for name, part in self.parameters.items():
                    offsets, _ = self._ranks.place(name, part)
                    spans = tuple(slice(begin, begin + n) for begin, n in zip(offsets, part.shape, strict=True))
                    part.copy_(whole.get_parameter(name)[spans])
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(whole.get_buffer(name))
        if self.average:  # it began as a copy of the weights that were drawn
            self.average = AveragedWeights(self.parameters, self.average.decay)

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

    def places(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Where in the whole each of these lies: offsets, and the shape of the whole."""
        return {name: self._ranks.place(parameter_of(name), part) for name, part in self.live().items()}

    def whole(self) -> dict[str, Tensor]:
        """The same, whole, on the main rank: copies in its host's memory if there are several. Nothing elsewhere.

        Raises: CheckFailed, on every rank, if what several ranks hold in common differs.
        """
        if self._ranks.alone:
            return self.live()
        self._ranks.at_rest(self.model)
        self._ranks.check_alike(self.parameters)
        found = {}
        for name, tensor in self.live().items():
            whole = self._ranks.whole(parameter_of(name), tensor)
            if self._ranks.main:
                found[name] = whole.to("cpu", copy=True)
        return found

    def whole_model(self) -> LanguageModel:
        """The model with all its weights, on the main rank; the others take part and have their own parts."""
        if self._ranks.alone:
            return self.model
        self._ranks.at_rest(self.model)
        made: list[LanguageModel] = []
        self._ranks.from_main(lambda: made.append(self._built()))  # if it cannot, nobody waits for its part below
        copy = made[0] if made else None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                value = self._ranks.whole(name, parameter)
                if copy is not None:
                    copy.get_parameter(name).copy_(value)
            for name, buffer in self.model.named_buffers() if copy is not None else ():
                copy.get_buffer(name).copy_(buffer)  # type: ignore[union-attr]
        return self.model if copy is None else copy.to(self._plan.device).eval()
