"""What torch.profiler recorded, by group of operators: used by `profile_cases.py`."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
from PIL import Image, ImageFile
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

# By the operator's name without its library's and without "_" around it.
OPERATORS = {
    "matmul": "addmm mm bmm baddbmm addmm_activation mkldnn_linear mkldnn_convolution slow_conv2d_forward convolution "
    "convolution_backward mkldnn_convolution_backward cudnn_convolution thnn_conv2d scaled_mm linear_backward "
    "mkldnn_linear_backward slow_conv2d_backward linear_pointwise",
    "softmax": "softmax softmax_backward_data log_softmax log_softmax_backward_data topk sort argmax max min amax "
    "nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward logsumexp cumsum safe_softmax",
    "norms": "native_layer_norm native_layer_norm_backward fused_rms_norm fused_rms_norm_backward gelu gelu_backward "
    "relu clamp_min threshold_backward silu silu_backward tanh tanh_backward native_dropout bernoulli add sub rsub mul "
    "div pow mean sum rsqrt sqrt exp log neg sigmoid erf sin cos abs eq ne lt le gt ge bitwise_and bitwise_or "
    "bitwise_not logical_not logical_and where masked_fill clamp any all linalg_vector_norm maximum minimum "
    "remainder floor_divide addcmul lerp",
    "copies": "copy cat fill zero clone repeat stack constant_pad_nd arange eye tril triu flip foreach_copy",
    "index": "index index_select gather scatter scatter_add embedding embedding_dense_backward index_put "
    "index_put_impl take_along_dim nonzero index_copy index_add unique unique2 masked_select take roll",
}
GROUP_OF = {name: group for group, names in OPERATORS.items() for name in names.split()}
# Without work of their own, as is what calls others.
VIEWS = frozenset(
    "view reshape reshape_alias unsafe_view transpose t permute expand slice select unsqueeze squeeze as_strided "
    "detach alias empty empty_strided empty_like resize unflatten split split_with_sizes chunk narrow unbind to item "
    "local_scalar_dense is_nonzero result_type lift_fresh diagonal movedim swapaxes".split()
)
GROUPS = ("matmul", "attention", "softmax", "norms", "copies", "index", "optimiser", "images", "other", "dispatch")
_FUSED = ("scaled_dot_product", "flash_attention", "efficient_attention")
_IMAGES = "image: "
_ONEDNN_LINEAR = "mkldnn::_linear_pointwise"  # see blip2_hf/modeling/linears.py
_LIBRARIES = ("aten::", "mkldnn::")


@dataclass(frozen=True)
class Profile:
    """Events of a run, its seconds, and whether it ran on a GPU."""

    events: list[FunctionEvent]
    seconds: float
    cuda: bool


@contextlib.contextmanager
def seen_images() -> Iterator[None]:
    """While active, the profiler sees what the image processor does with Pillow and NumPy (in its own thread)."""

    def watched(function: Callable, name: str) -> Callable:
        def call(*args: object, **options: object) -> object:
            with record_function(_IMAGES + name):
                return function(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for owner, attribute, name in (
            (ImageFile.ImageFile, "load", "decode"),
            (Image.Image, "resize", "resize"),
            (Image.Image, "split", "split"),
            (np, "take", "look up"),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, watched(getattr(owner, attribute), name)))
        yield


def plain(name: str) -> str:
    """An operator's name without its library's and without signs that it works in place."""
    return name if name.startswith(_IMAGES) else name.split("::")[-1].strip("_")


def group_of(name: str, callers: Iterable[str], calls: bool) -> str:
    """Of an operator that was called by `callers` and `calls` others or not."""
    if name.startswith(_IMAGES):
        return "images"
    around = [name, *callers]
    if any(each.startswith("Optimizer.") for each in around):
        return "optimiser"
    if any(part in each for each in around for part in _FUSED):
        return "attention"
    if plain(name) in GROUP_OF:
        return GROUP_OF[plain(name)]
    return "dispatch" if calls or plain(name) in VIEWS or not name.startswith(_LIBRARIES) else "other"


def callers_of(event: FunctionEvent) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def operations_of(event: FunctionEvent) -> int:
    """Floating point operations of a product; the profiler does not know those of oneDNN's linear layers."""
    if event.name == _ONEDNN_LINEAR:
        states, weight = event.input_shapes[:2]
        return 2 * math.prod(states) * weight[0]
    return event.flops or 0


def summary(found: Profile, repeats: int) -> dict[str, object]:
    """For a case's record: see `profile_cases.py`."""
    groups: dict[str, float] = defaultdict(float)
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    operations = 0
    for event in found.events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: counted with what launched it
        group = group_of(event.name, callers_of(event), bool(event.cpu_children))
        if group == "dispatch":
            continue
        own = (event.self_device_time_total if found.cuda else event.self_cpu_time_total) / 1e6
        groups[group] += own
        entry = operators[plain(event.name)]
        entry[0], entry[1] = entry[0] + own, entry[1] + 1
        operations += operations_of(event) if group == "matmul" else 0
    groups["dispatch"] = max(0.0, found.seconds - sum(groups.values()))
    most = sorted(operators.items(), key=lambda item: -item[1][0])[:5]
    return {
        "profiled_seconds": round(found.seconds / repeats, 3),
        "groups": {name: round(groups[name] / found.seconds, 4) for name in GROUPS if groups[name]},
        "operators": [[name, round(own / found.seconds, 4), round(calls / repeats)] for name, (own, calls) in most],
        "matmul_gflops": round(operations / groups["matmul"] / 1e9, 1) if operations else None,
    }
