"""What a model computes on the way to its result, by places that all layouts share ("tower, layer 3")."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

QUERY_PASS = "queries"


@dataclass
class Trace:
    """Intermediate and final results of one side, on the CPU.

    Attributes:
        places: in the order in which they are computed, float32; "tower, …", "Q-Former, PASS, …",
            "language model, …", then "end, …".
        masks: for places of ragged rows, which of the positions are real.
        new: parameters that the checkpoint lacks and the model was loaded without ("newly initialised").
        surplus: parameters of the checkpoint that the model has no place for.
    """

    places: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()


class Recorder:
    """Writes a trace; may put the results of another trace in the place of those that it is told.

    So each layer can be checked on its own: with the other side's results as its input.

    Attributes:
        reference: results that the forward goes on with; None: its own.
        current: name of the Q-Former's pass ("queries", "text", …).
    """

    def __init__(self, reference: Trace | None = None) -> None:
        self.trace = Trace()
        self.reference = reference
        self.current = QUERY_PASS
        self._row_masks: dict[str, torch.Tensor] = {}

    def rows(self, name: str, mask: torch.Tensor) -> None:
        """From here on, places that begin with `name` have rows of which `mask` [B, N] (1 = real) says what counts."""
        self._row_masks[name] = mask.detach().bool().cpu()

    def __call__(self, place: str, states: torch.Tensor) -> torch.Tensor:
        """Notes `states` and returns what to go on with."""
        self.trace.places[place] = states.detach().float().cpu().clone()
        for name, mask in self._row_masks.items():
            if place.startswith(name) and mask.shape == states.shape[: mask.ndim]:
                self.trace.masks[place] = mask
        if self.reference is None or place not in self.reference.places:
            return states
        other = self.reference.places[place]
        return other.to(states) if other.shape == states.shape else states


@contextlib.contextmanager
def watched(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Every layer of tower, Q-Former and language model tells the recorder what it gives, while this lasts."""
    handles = []

    def watch_stack(layers: list[nn.Module], name: str | None) -> None:
        """`name` None: that of the Q-Former's current pass."""

        def place(rest: str) -> str:
            return f"{name or f'Q-Former, {recorder.current}'}, {rest}"

        def before(module: nn.Module, args: tuple, kwargs: dict):
            if args:
                return (recorder(place("embeddings"), args[0]), *args[1:]), kwargs
            states = recorder(place("embeddings"), kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": states}

        handles.append(layers[0].register_forward_pre_hook(before, with_kwargs=True))
        for index, layer in enumerate(layers):

            def after(module: nn.Module, args: tuple, output, index: int = index):
                if isinstance(output, tuple):
                    return (recorder(place(f"layer {index}"), output[0]), *output[1:])
                return recorder(place(f"layer {index}"), output)

            handles.append(layer.register_forward_hook(after))

    def watch_norm(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        # transformers also norms the class token alone, for a vector that nothing reads
        return recorder("tower, ln_vision", output) if output.ndim == 3 else output

    tower = model.vision_model
    watch_stack(_stacks(tower)[0][1], "tower")
    handles.append(tower.post_layernorm.register_forward_hook(watch_norm))
    watch_stack(list(model.qformer.encoder.layer), None)
    if hasattr(model, "language_model"):
        handles += _watch_language_model(model.language_model, recorder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched_language_model(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The same for a language model on its own."""
    handles = _watch_language_model(model, recorder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_language_model(model: nn.Module, recorder: Recorder) -> list:
    handles = []
    for name, layers in _stacks(model):
        part = "decoder" if "decoder" in name or not model.config.is_encoder_decoder else "encoder"
        for index, layer in enumerate(layers):

            def after(module: nn.Module, args: tuple, output, place: str = f"language model, {part} layer {index}"):
                if isinstance(output, tuple):
                    return (recorder(place, output[0]), *output[1:])
                return recorder(place, output)

            handles.append(layer.register_forward_hook(after))
    return handles


def _stacks(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """The outermost stacks of layers, by name, without what stands in for a layer that is not computed."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            layers = [layer for layer in module if any(True for _ in layer.parameters())]
            if layers:
                found[name] = layers
    return list(found.items())
