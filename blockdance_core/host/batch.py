"""Some rows of a model call, and the results of several such calls as one.

Host: conditionings are concatenated on axis 0 (comfy/conds.py, v0.30.0); whatever has not as many rows is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def taken(value: Any, rows: Tensor, count: int) -> Any:
    """Some rows of everything in a call that has `count` of them.

    Args:
        value: A tensor, or lists, tuples and dictionaries of them; everything else is left as it is.
        rows: Which rows, on the device of the call.
        count: Rows of the whole call.
    """
    if isinstance(value, Tensor):
        per_row = value.ndim > 0 and value.shape[0] == count
        return value.index_select(0, rows.to(value.device)) if per_row else value
    if isinstance(value, dict):
        return {key: taken(one, rows, count) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(taken(one, rows, count) for one in value)
    return value


def joined(results: Sequence[Any], parts: Sequence[Tensor]) -> Any:
    """The result of the whole call.

    Args:
        results: Those of its parts: a tensor [rows, ...] each, or a list or tuple of such tensors.
        parts: The rows of each part.
    """
    if not isinstance(results[0], Tensor):
        return type(results[0])(joined(one, parts) for one in zip(*results, strict=True))
    return torch.cat(list(results), 0).index_select(0, torch.cat(list(parts)).argsort().to(results[0].device))
