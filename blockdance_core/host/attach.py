"""Attach the configuration to a MODEL: a clone with keyed wrappers. The state of a run lives in its `Session`.

Host: comfy/patcher_extension.py and comfy/samplers.py, v0.30.0. OUTER_SAMPLE holds first PREPARE_SAMPLING, and then per
evaluation PREDICT_NOISE > per batch APPLY_MODEL.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from comfy import model_management
from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP, get_all_wrappers

from blockdance_core import families
from blockdance_core.config import Config
from blockdance_core.host import batch, identity, notify
from blockdance_core.host.levels import accepted_errors, noise_levels
from blockdance_core.interception import taps
from blockdance_core.model_state import in_force, kept, planned
from blockdance_core.policy import AdaptivePolicy
from blockdance_core.report import run_record, summary
from blockdance_core.session import Session
from blockdance_core.visit import CallInfo

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import WrapperExecutor

    from blockdance_core.schedule import Schedule

log = logging.getLogger(__name__)
KEY = "blockdance"
_MAX_RUNS = 512  # a tiled upscale has one run a tile
_TEXT_TOKENS = 512
_GUIDANCE = ("sampler_pre_cfg_function", "sampler_post_cfg_function")


class Handle:
    """What a MODEL and its clones carry: the configuration, and figures of finished runs. No tensors.

    Attributes:
        config: The settings of the node.
        node_id: The Accelerate node, for messages to the page.
        effective: The settings in force for this model.
        family: Name of the model family.
        width: Width of the model's tokens, for the estimate before the first evaluation.
        quiet: Whether runs are neither logged nor shown on the page.
        depth: Number of blocks.
        taps: For every boundary, the blocks whose output is stored; `depth` stands for the whole model.
    """

    def __init__(self, config: Config, node_id: str | None, match: families.Match, quiet: bool = False) -> None:
        self.config = config
        self.node_id = node_id
        self.quiet = quiet
        self.family = match.family.name
        self.effective = in_force(config, match)
        shapes = [min(parameter.shape) for parameter in match.blocks[0].module.parameters() if parameter.ndim == 2]
        self.width = statistics.mode(shapes) if shapes else 0
        self.depth = len(match.blocks)
        self.taps = [taps(match.blocks, boundary) for boundary in range(self.depth + 1)]
        self._runs: collections.deque[tuple[str | None, dict[str, Any]]] = collections.deque(maxlen=_MAX_RUNS)

    def add(self, run: dict[str, Any], prompt_id: str | None) -> None:
        """Log a finished run."""
        self._runs.append((prompt_id, run))

    def runs(self, prompt_id: str | None = None) -> list[dict[str, Any]]:
        """Finished runs, oldest first: those of one prompt, or of the last one that sampled."""
        prompts = [prompt for prompt, _ in self._runs]
        if prompts and (prompt_id is None or prompt_id not in prompts):
            prompt_id = prompts[-1]
        return [run for prompt, run in self._runs if prompt == prompt_id]


def attach(model: ModelPatcher, config: Config, node_id: str | None = None, quiet: bool = False) -> ModelPatcher:
    """A clone of `model` that is accelerated as configured whenever it is sampled. The input stays as it is.

    Args:
        model: The host's MODEL. If it was accelerated before, the new settings replace the old ones.
        config: Settings. Inactive ones (`enabled` false or N = 1) leave the result bit-identical; time is measured.
        node_id: The node to send messages to.
        quiet: Neither log runs nor show them on the page, for one of hundreds.

    Raises:
        UnsupportedModelError: No list of blocks that can be skipped was found.
        ConfigError: The boundary is outside the depth of the model, or the policy is for another model.
    """
    handle = Handle(config, node_id, match_of(model), quiet)
    clone = model.clone()
    for wrapper_type, wrapper in (
        (WrappersMP.OUTER_SAMPLE, functools.partial(_outer_sample, handle)),
        (WrappersMP.PREPARE_SAMPLING, _prepare_sampling),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
        (WrappersMP.APPLY_MODEL, _apply_model),
    ):
        clone.remove_wrappers_with_key(wrapper_type, KEY)
        clone.add_wrapper_with_key(wrapper_type, KEY, wrapper)
    clone.set_attachments(KEY, handle)
    return clone


def match_of(model: ModelPatcher) -> families.Match:
    """The family and the blocks of a MODEL.

    Raises:
        UnsupportedModelError: No list of blocks that can be skipped was found.
    """
    return families.find(model.get_model_object("diffusion_model"))


def depth_of(model: ModelPatcher) -> int:
    """How many blocks a MODEL has."""
    return len(match_of(model).blocks)


def kind_of(model: ModelPatcher) -> tuple[str, int]:
    """The name of the family of a MODEL, and how many blocks it has: what a policy is for."""
    match = match_of(model)
    return match.family.name, len(match.blocks)


def handle_of(model: ModelPatcher) -> Handle | None:
    """The handle that `attach` left on a MODEL, through any clones; None if there is none."""
    handle = model.get_attachment(KEY)
    return handle if isinstance(handle, Handle) else None


def _outer_sample(handle: Handle, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    prompt_id, sampler_node = notify.executing()
    session = _session(handle, guider, dict(zip(("noise", "latent_image", "sampler", "sigmas"), args, strict=False)) | kwargs)
    if not handle.quiet:
        session.listener = _teller(handle.node_id, prompt_id, len(session.figures))
    before = guider.model_options
    guider.model_options = create_model_options_clone(before)
    options = guider.model_options.setdefault("transformer_options", {})
    options[KEY] = session
    session.wrapped = "model_function_wrapper" in guider.model_options
    _place(options.get("wrappers", {}))
    for name in _GUIDANCE:
        if name in guider.model_options:
            guider.model_options[name] = [
                _named(session, (name, index), function) for index, function in enumerate(guider.model_options[name])
            ]
    completed = False
    try:
        result = executor(*args, **kwargs)
        completed = True
        return result
    finally:
        guider.model_options = before
        session.close()
        # A device that failed fails again when it is asked for the times: the first error is the one to show.
        with nullcontext() if completed else suppress(RuntimeError):
            run = run_record(session, completed=completed)
            handle.add(run, prompt_id)
            if not handle.quiet:
                line = summary(run)
                log.info("%s", line)
                notify.send("run", {"node_id": handle.node_id, "prompt_id": prompt_id, "summary": line, "run": run})
                notify.progress_text(line, sampler_node)


def _session(handle: Handle, guider: Any, given: dict[str, Any]) -> Session:
    """The session of a run that is given `noise`, `sampler`, `sigmas` and maybe `latent_shapes`."""
    config, sigmas = handle.config, [float(sigma) for sigma in given["sigmas"]]
    # Nodes such as ModelSampling* replace model_sampling on a later clone; BaseModel's own may still be a former run's.
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    levels = noise_levels(model_sampling, sigmas) if config.active else []
    sampler = sampler_name(given["sampler"])
    # A latent of several parts (video and audio) arrives flattened into one row; its shapes come beside it.
    shapes = given.get("latent_shapes") or [given["noise"].shape]
    text, policy = None, config.policy if config.active else None
    if isinstance(policy, AdaptivePolicy):
        text = identity.text(getattr(guider, "conds", {}), shapes[0][0])
        policy.require(shapes[0][1] if len(shapes) == 1 else 1, None if text is None else text.shape[2])
    plan = planned(config, handle.effective, levels, sampler)
    accepted = accepted_errors(model_sampling, sigmas, handle.depth in plan.boundaries) if config.guarded else []
    together = _undivided(guider.model_options.get("transformer_options", {}))
    session = Session(config, sigmas, levels, sampler, accepted, text, together)
    if plan.boundaries and _adds_noise(sampler) and not config.guarded:
        session.warn(f"{sampler} adds fresh noise at every step, which nothing that is stored foretells: pictures change more. "
                     "Prefer a sampler that adds none, or set a quality, which stops reuse where it does harm")
    other = getattr(guider, "uncond_model_patcher", None)  # the host's DualModelGuider runs both within one run
    second = None if other is None else handle_of(other)
    if second is not None and second.config != config:
        session.warn("the settings of the negative model are not used: those of the other one hold for both")
    session.announced_bytes = _announced_bytes(handle, guider.model_patcher, shapes, plan)
    return session


def _teller(node_id: str | None, prompt_id: str | None, steps: int) -> Callable[[int, str], None]:
    """Tells the page what every step did, when it is finished."""
    decisions: list[str | None] = [None] * steps

    def tell(step: int, decision: str) -> None:
        decisions[step] = decision
        notify.send("progress", {
            "node_id": node_id, "prompt_id": prompt_id, "step": step, "steps": steps, "decision": decision,
            "decisions": list(decisions),
        })

    return tell


def sampler_name(sampler: Any) -> str:
    """The name of a SAMPLER: that of its function, as far as the host tells."""
    function = getattr(sampler, "sampler_function", None)
    return str(getattr(function, "__name__", type(sampler).__name__)).removeprefix("sample_").removesuffix("_gpu")


def _adds_noise(sampler: str) -> bool:
    """Whether a sampler adds fresh noise at every step, by its name: the host's say so, and most others."""
    return any(part in sampler for part in ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver"))


def _prepare_sampling(
    executor: WrapperExecutor, model: ModelPatcher, noise_shape: Sequence[float], conds: Any, *args: Any, **kwargs: Any
) -> Any:
    model_options = kwargs.get("model_options", args[0] if args else None)  # passed on as it came: others look it up by name
    options = (model_options or {}).get("transformer_options", {})
    session = _session_in(options)
    if session is not None:
        _place(options.get("wrappers", {}))  # once more: other nodes may have added theirs around the run
    # The host keeps free what its estimate for this shape says. Features come on top: ask for that many more samples, or that
    # part of one.
    if session is not None and session.announced_bytes:
        of_one = model.model.memory_required([1, *noise_shape[1:]])
        noise_shape = [noise_shape[0] + session.announced_bytes / (2 * max(of_one, 1)), *noise_shape[1:]]
    return executor(model, noise_shape, conds, *args, **kwargs)


def _announced_bytes(handle: Handle, model: ModelPatcher, shapes: Sequence[Sequence[int]], plan: Schedule) -> int:
    """Estimate of the bytes to be stored on the model's device, before anything is known of the tokens."""
    if not plan.boundaries or handle.config.cache_device == "cpu" or model_management.is_device_cpu(model.load_device):
        return 0
    patch = getattr(model.get_model_object("diffusion_model"), "patch_size", None) or 2
    per_token = math.prod(patch) if isinstance(patch, (tuple, list)) else int(patch) ** 2
    tokens = sum(math.prod(shape[2:]) for shape in shapes) // per_token + _TEXT_TOKENS
    output = shapes[0][0] * tokens * handle.width * model.model.get_dtype_inference().itemsize
    slope = 4 * sum(math.prod(shape) for shape in shapes)
    stored = {tap for boundary in plan.boundaries for tap in handle.taps[boundary]}
    return 2 * kept(handle.config, plan) * sum(slope if tap == handle.depth else output for tap in stored)


def _place(wrappers: dict[str, dict[str, list[Any]]]) -> None:
    """Put ours where they belong, wherever our node stands in the graph.

    Around an evaluation outermost, so that what another wrapper makes of it counts as one; around the model innermost, so
    that the blocks that are hooked are the ones that run, compiled ones for example.
    """
    evaluation, model = wrappers.get(WrappersMP.PREDICT_NOISE, {}), wrappers.get(WrappersMP.APPLY_MODEL, {})
    if KEY in evaluation:
        wrappers[WrappersMP.PREDICT_NOISE] = {KEY: evaluation.pop(KEY), **evaluation}
    if KEY in model:
        model[KEY] = model.pop(KEY)


def _named(session: Session, name: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
    """A guidance function whose own model calls bear its name.

    Such calls share everything with the prompt's own. They are numbered; when one function stops calling in mid-run, the
    numbers of the others would shift.
    """
    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with session.calls_of(name):
            return function(*args, **kwargs)

    return named


def _predict_noise(
    executor: WrapperExecutor, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    options = model_options.get("transformer_options", {})
    session = _session_in(options)
    if session is None or session.evaluating:
        return executor(x, timestep, model_options, *args, **kwargs)
    if x.requires_grad and x.is_leaf:  # as the host's Train LoRA gives it: no sampling, whatever the sigmas say
        session.warn("the model is being trained: everything is computed")
        without = {**model_options, "transformer_options": {key: value for key, value in options.items() if key != KEY}}
        return executor(x, timestep, without, *args, **kwargs)
    sigma = float(timestep.reshape(-1)[0])  # synchronises the GPU, once per evaluation
    conds = getattr(executor.class_obj, "conds", {})
    controls = identity.active_controls(conds, sigma)
    with session.evaluation(sigma, controls, x):
        estimate = executor(x, timestep, model_options, *args, **kwargs)
        session.saw(estimate)
        return estimate


def _apply_model(
    executor: WrapperExecutor, x: torch.Tensor, t: torch.Tensor, c_concat: Any = None, c_crossattn: Any = None,
    control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any,
) -> Any:
    options = dict(transformer_options or {})
    # The model itself never sees the session: core TorchCompileModel puts no guards on these options, so a model that
    # was compiled with a key fails in a run without it.
    session = options.pop(KEY, None)
    if not isinstance(session, Session):
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    evaluation = nullcontext() if session.evaluating else session.evaluation(float(t.reshape(-1)[0]))
    model: BaseModel = executor.class_obj

    streams: tuple[Hashable, ...] = identity.streams(options, session.caller)
    if session.shape is not None and x.shape[0] != len(streams) * session.shape[0]:
        streams = tuple((stream,) for stream in streams)  # tiles in one batch: nobody says which half is whose

    def describe(rows: int) -> CallInfo:
        return CallInfo(
            streams=streams, rows=rows, device=x.device,
            replaced=frozenset(options.get("patches_replace", {}).get("dit", {})),
            condition=(
                session.condition, identity.control_shapes(control), identity.hook_strengths(model),
                identity.active_patches(options, session.sigma),
            ),
            room=lambda: _room(model, x),
            wrapped=session.wrapped or bool(get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)),
        )

    def run(part: int | None, x: Any, t: Any, c_concat: Any, c_crossattn: Any, control: Any, kwargs: dict[str, Any]) -> Any:
        def sample() -> Any:
            return executor(x, t, c_concat, c_crossattn, control, dict(options), **kwargs)

        with session.call(model, model.diffusion_model, x.device, lambda: describe(x.shape[0]), part) as visit:
            return sample() if visit is None else visit.denoised(x, t, sample)

    with evaluation:
        given = (x, t, c_concat, c_crossattn, control, kwargs)
        parts = session.split(model, x.shape[0], len(options.get("cond_or_uncond", ())))
        if parts is None:
            return run(None, *given)
        indices = [torch.tensor(rows, device=x.device) for rows in parts]
        results = [run(number, *batch.taken(given, rows, x.shape[0])) for number, rows in enumerate(indices)]
        return batch.joined(results, indices)


def _undivided(options: dict[str, Any]) -> bool:
    """Whether something beside the model may hold a row for each sample of the whole batch, as Uni3C and LLLite patches do."""
    patches = any(any(options.get(kind, {}).values()) for kind in ("patches", "patches_replace"))
    return patches or bool(get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options))


def _session_in(options: dict[str, Any]) -> Session | None:
    session = options.get(KEY)
    return session if isinstance(session, Session) else None


def _room(model: BaseModel, x: torch.Tensor) -> float:
    """Bytes free on the device beyond what the host expects one call of this batch to need.

    Asked as the host asks before it batches conditionings: weights that it would give up for them count as free. (Releases
    that never give up any have no such question.)
    """
    free = getattr(getattr(model, "current_patcher", None), "get_free_memory", model_management.get_free_memory)
    return float(free(x.device)) - float(model.memory_required(list(x.shape)))
