"""Values of parameters that are spread over processes."""

from __future__ import annotations

import torch


def whole_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole value of a parameter under FSDP2 or DeepSpeed's ZeRO-3 (all processes must ask together)."""
    if hasattr(parameter, "full_tensor"):  # FSDP2
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()
