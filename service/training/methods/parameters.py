"""A parameter's type and content, whether it is whole or, under ZeRO-3, spread over the workers."""

from __future__ import annotations

from typing import Any

import torch


def make_float32(parameter: Any) -> None:
    """float32 in place: the module, the optimizer and whatever is tied keep the same parameter."""
    parameter.data = parameter.data.float()
    if hasattr(parameter, "ds_tensor"):  # this worker's share; the parameter itself is then empty
        parameter.ds_tensor.data = parameter.ds_tensor.data.float()


def shape_of(parameter: Any) -> torch.Size:
    """The whole weight's shape."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def set_content(parameter: Any, tensor: torch.Tensor) -> None:
    """Copy `tensor` into a parameter. Under ZeRO-3 a collective: every worker must call it with the same tensor."""
    with torch.no_grad():
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(tensor)
            return
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(tensor)
