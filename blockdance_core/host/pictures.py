"""The pictures of a training, and what choices do to them: found out by sampling.

Rollouts share the full run's first steps, up to the decision. Under torchrun every process samples its share of the prompts and
the outcomes are gathered.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor

from blockdance_core.config import ConfigError
from blockdance_core.host.identity import text
from blockdance_core.host.processes import gathered, mine, world
from blockdance_core.host.rewards import Reward
from blockdance_core.host.rollout import Prompt, Rollouts
from blockdance_core.policy import AdaptivePolicy
from blockdance_core.policy.network import DecisionNetwork, Sight
from blockdance_core.policy.training import Chosen, Outcome, Reading

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_HELD = 256
"""Prompts of whose full runs the part that rollouts share is kept in memory."""


class Pictures:
    """The prompts of a training, and what choices do to them.

    Args:
        model: MODEL, as the sampler would get it.
        prompts: What is sampled; batches may differ in size.
        texts: What each of the prompts says, for rewards that read it: one text, or one of each sample.
        policy: What is trained.
        reward: Says how good a result is.
        costs: For each boundary, what a reuse step costs as a share of a computed one.
        share: Whether rollouts share the steps before the decision.

    Attributes:
        of: For every picture its prompt and its place in the batch.
        rollouts: Number of runs so far, in this process.
        calls: Calls of the model in them.
    """

    def __init__(
        self, model: ModelPatcher, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], policy: AdaptivePolicy,
        reward: Reward, costs: dict[int, float], share: bool,
    ) -> None:
        self.model, self.prompts, self.texts, self.policy, self.reward = model, prompts, texts, policy, reward
        self.costs, self.share = costs, share
        self.of = [(k, row) for k, prompt in enumerate(prompts) for row in range(prompt.latent.shape[0])]
        self.rollouts = self.calls = 0
        self._full: collections.OrderedDict[int, Rollouts] = collections.OrderedDict()
        features = [row.forecast.features for segment in policy.segments for plan in segment.options for row in plan if row]
        self.history = max(features, default=1)  # steps before the decision that a reuse may look back on

    def readings(self, network: DecisionNetwork, done: Callable[[], None]) -> list[Reading]:
        """What the network reads of every picture, without its text, see `with_texts`."""
        found: dict[int, list[Reading]] = {}
        for k in mine(range(len(self.prompts))):
            full = self.rollouts_of(k).full
            if not found:
                self._judged(k, full.result)  # what is missing for the reward is missed now, not behind all full runs
            start, prompt = self.policy.start, self.prompts[k]
            estimates = [one for step, one in full.estimates if step < start][-2:]
            if len(estimates) < 2:
                raise ConfigError(f"The sampler {prompt.sampler} evaluates the model less than twice before step {start + 1}, "
                                  "where the network looks: choose a larger start, or another sampler.")
            before, last = estimates
            latent = full.entered[start]
            cells, places, _ = network.read(Sight(latent, last, last - before, _text(prompt, latent.shape[0])))
            found[k] = [Reading(row.clone(), places, None) for row in cells]
            self._trim(k)
            done()
        whole = gathered(found)
        return [whole[k][row] for k, row in self.of]

    def with_texts(self, readings: Sequence[Reading]) -> list[Reading]:
        """The same with the text of every picture. Embeddings are large, so they come from the prompts whenever needed."""
        if not self.policy.network.shape.text_width:
            return list(readings)
        texts = [_text(prompt, prompt.latent.shape[0]) for prompt in self.prompts]
        found = []
        for reading, (k, row) in zip(readings, self.of, strict=True):
            words = texts[k]
            assert words is not None  # the width is that of the first prompt's, and `read` has seen them all
            found.append(reading._replace(text=words[row].to("cpu", torch.float32)))
        return found

    def ask(
        self, pairs: Sequence[tuple[int, Chosen]], done: Callable[[dict[tuple[int, Chosen], Outcome]], None]
    ) -> list[Outcome]:
        """What choices do to pictures; `done` is told outcomes as they come, also those of other samples of the batches."""
        wanted: dict[int, list[Chosen]] = {}
        for picture, chosen in pairs:
            of = wanted.setdefault(self.of[picture][0], [])
            of += [chosen] if chosen not in of else []
        first = {prompt: min(p for p, (k, _) in enumerate(self.of) if k == prompt) for prompt in wanted}
        known: dict[tuple[int, Chosen], Outcome] = {}
        for some in _batched(sorted(wanted)):
            found = {}
            for k in mine(some):
                for chosen in wanted[k]:
                    for row, outcome in enumerate(self._outcomes(k, chosen)):
                        found[first[k] + row, chosen] = outcome
            found = gathered(found)
            known |= found
            done(found)
        return [known[pair] for pair in pairs]

    @torch.inference_mode()  # as the host runs its nodes: weights that were loaded so cannot be moved otherwise
    def _outcomes(self, k: int, chosen: Chosen) -> list[Outcome]:
        rollouts, plan = self.rollouts_of(k), self.policy.plan(chosen)
        self._trim(k)
        run = rollouts.run(plan, range(self._replayed))
        self.rollouts += 1
        self.calls += sum(run.record["calls"])
        cut = sum(1 - self.costs[row.boundary] for row in plan if row) / len(plan)
        return [Outcome(quality, cut) for quality in self._judged(k, run.result)]

    @torch.inference_mode()
    def _judged(self, k: int, result: torch.Tensor) -> list[float]:
        """What the reward says of a result of a prompt, for every sample."""
        found, full = (self._as_returned(one, self.prompts[k].latent) for one in (result, self.rollouts_of(k).full.result))
        qualities = [float(quality) for quality in self.reward(found, full, self.texts[k]).tolist()]
        if not all(math.isfinite(quality) for quality in qualities):
            raise ConfigError(f"The reward {self.reward.name} gave {qualities} for prompt {k + 1}: expected finite numbers.")
        return qualities

    def _as_returned(self, result: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """A result as the host's sampler nodes return it; of several parts (a clip with its sound), nested again."""
        out: torch.Tensor = self.model.model.process_latent_out(result)
        if not latent.is_nested:
            return out
        nested: torch.Tensor = NestedTensor(comfy.utils.unpack_latents(out, [part.shape for part in latent.unbind()]))
        return nested

    @property
    def _replayed(self) -> int:
        """How many first steps of a rollout are taken from the full run."""
        return max(self.policy.start - self.history, 0) if self.share else 0

    def _trim(self, k: int) -> None:
        self.rollouts_of(k).forget(self._replayed)

    @torch.inference_mode()
    def rollouts_of(self, k: int) -> Rollouts:
        """The runs of a prompt, the full one made; a few are kept."""
        if k not in self._full:
            self._full[k] = Rollouts(self.model, self.prompts[k])
            self.rollouts += 1
            self.calls += self._full[k].calls
        self._full.move_to_end(k)
        while len(self._full) > _HELD:
            self._full.popitem(last=False)
        return self._full[k]


def _text(prompt: Prompt, rows: int) -> torch.Tensor | None:
    """What a prompt says, as a run of it would have it."""
    return text({"positive": [{"cross_attn": embedding, **more} for embedding, more in prompt.positive]}, rows)


def _batched(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[k : k + world()] for k in range(0, len(numbers), world())]
