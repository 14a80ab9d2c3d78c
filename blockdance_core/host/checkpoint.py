"""The checkpoint of a training: what it has to have in common with the training that goes on with it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockdance_core.config import ConfigError
from blockdance_core.host.rollout import Prompt, sigmas_of
from blockdance_core.policy import AdaptivePolicy

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_FEW = 4
"""Values of each tensor of a model that tell it from others."""


def digest(
    model: ModelPatcher, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], policy: AdaptivePolicy
) -> str:
    """What a training goes on with has to be the same: prompts with all that belongs to them, sizes, schedules, the model.

    Of the model and its patches a few values of each tensor count, but none of a patched weight: it may be in place or not.
    """
    found = hashlib.sha256(repr((
        [list(some) for some in texts], policy.segments, policy.base.family, policy.base.depth, sigmas_of(model, prompts[0]),
        sorted((str(key), [patch[0] for patch in patches]) for key, patches in model.patches.items()),
    )).encode())
    for prompt in prompts:
        for tensor in _tensors((prompt.latent, prompt.noise_mask, prompt.positive, prompt.negative)):
            found.update(repr(tuple(tensor.shape)).encode() + tensor.detach().float().cpu().numpy().tobytes())
    weights = {key: value for key, value in model.model.state_dict().items() if key not in model.patches}
    held = [[_inner(patch) for patch in model.patches[key]] for key in sorted(model.patches, key=str)]
    for tensor in _tensors((weights, held)):
        with contextlib.suppress(RuntimeError, TypeError):  # of a kind that gives no values, such as a packed one
            found.update(tensor.detach().flatten()[:_FEW].float().cpu().numpy().tobytes())
    return found.hexdigest()


def _inner(patch: Any) -> Any:
    """What a patch of the host holds: that of an adapter, such as a LoRA, lies in an attribute."""
    return [getattr(part, "weights", part) for part in patch] if isinstance(patch, (list, tuple)) else patch


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in lists, tuples, dictionaries and the host's nested latents, in order."""
    if getattr(value, "is_nested", False):
        value = value.unbind()
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def resumed(checkpoint: Path, about: dict[str, Any]) -> dict[str, Any] | ConfigError | None:
    """The checkpoint; an error is returned, for all processes to raise."""
    if not checkpoint.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        same = _extensible(json.loads(state["about"])) == _extensible(json.loads(json.dumps(about)))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        return ConfigError(f"Cannot go on from {checkpoint}: it is damaged ({type(error).__name__}). Remove it, or choose "
                           "another name.")
    if not same:
        return ConfigError(f"{checkpoint} is of another training, with other prompts or settings. Remove it, or choose another "
                           "name.")
    return state


def _extensible(about: dict[str, Any]) -> dict[str, Any]:
    """Without what only says when to stop: a training that was stopped may be given more time."""
    settings = {name: value for name, value in about["settings"].items() if name not in ("epochs", "patience")}
    return about | {"settings": settings}
