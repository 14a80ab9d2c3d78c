"""Teach a decision network by policy gradient. Pure: what a choice earns is asked of whoever runs the model.

Source: BlockDance-Ada, Zhang et al., arXiv 2503.15927.

Reward R = C + lambda Q. Published: REINFORCE on independent steps, one lambda. Here a choice never has to be tried twice on a
picture, as a run is determined by its seed; where there are few choices all of them are tried, and the gradient is that of the
expected reward itself; and one network learns several lambdas, its levels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockdance_core.policy.adaptive import AdaptivePolicy
from blockdance_core.policy.network import DecisionNetwork

ENUMERATED = 64
"""With at most so many choices in all, every one of them can be tried on every picture."""
_BIAS = 2.0
"""Head start in the logits of what is best for all pictures alike, where choices are drawn."""
_HINT = 0.1
"""The same where all of them are tried."""
_ENTROPY = (2.0, 0.6)
"""Weight of the entropy at the beginning, and from the middle on."""
_LEAST_GAP = 1e-4
_WARM = 8
"""On so many pictures it is found out what that is, where not everything is tried."""

Chosen = tuple[int, ...]
"""The option of every segment."""


class Outcome(NamedTuple):
    """What a choice did to one picture: quality Q, more is better, and cut C, the share of the time saved."""

    quality: float
    cut: float


class Reading(NamedTuple):
    """What the network reads of one picture, see `DecisionNetwork.read`; without the axis of the batch."""

    cells: Tensor
    places: Tensor
    text: Tensor | None


Ask = Callable[[Sequence[tuple[int, Chosen]]], Sequence[Outcome]]
"""What choices do to pictures, given as (number of the picture, choice)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a network is taught.

    Attributes:
        tradeoffs: lambda of each level, the weight of quality against time saved.
        epochs: At most so many passes over the pictures.
        patience: Stop after so many passes without a better reward on held-out pictures.
        group: Choices tried of each picture and level in a pass, where not all are tried.
        pictures: Pictures in an update.
        rate: Learning rate.
        held_out: Share of the prompts that are held out, for the stop and for choosing the best pass.
        baseline: Whether the mean reward of a group is subtracted (published: no).
        exact: Whether all choices are tried where they are few, and the gradient is exact (published: no).
        seed: Of everything that is drawn.
    """

    tradeoffs: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    epochs: int = 200
    patience: int = 60
    group: int = 8
    pictures: int = 16
    rate: float = 1e-3
    held_out: float = 0.25
    baseline: bool = True
    exact: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("tradeoffs", bool(self.tradeoffs) and all(math.isfinite(one) and one >= 0 for one in self.tradeoffs),
             "one number or more, none below 0"),
            ("epochs", self.epochs >= 1, "1 or more"), ("patience", self.patience >= 1, "1 or more"),
            ("group", self.group >= 2 or not self.baseline, "2 or more: a group of one has no mean to compare with"),
            ("pictures", self.pictures >= 1, "1 or more"), ("rate", 0 < self.rate < 1, "between 0 and 1"),
            ("held_out", 0 <= self.held_out < 1, "a share from 0 to below 1"),
        ):
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)} is not valid: expected {expected}.")


class Trainer:
    """Teaches the network of a policy, which is changed in place.

    Args:
        policy: With one level for each trade-off; its `cuts` are not looked at.
        readings: One of each picture.
        prompts: Which prompt each picture belongs to; those of one are held out together.
        ask: Tells what choices do.
        settings: How.

    Attributes:
        curve: A row a pass, and one before the first: `epoch`, and for every level the mean `reward` on training pictures and
            `held_out`, and the `cut`.
        best: Score, pass and weights of the best pass.
        known: Every outcome so far.
    """

    def __init__(
        self, policy: AdaptivePolicy, readings: Sequence[Reading], prompts: Sequence[int], ask: Ask, settings: Settings
    ) -> None:
        self.policy, self.readings, self.settings = policy, list(readings), settings
        self._ask = ask
        self.network: DecisionNetwork = policy.network.train().requires_grad_(True)
        self.sizes = [len(segment.options) for segment in policy.segments]
        few = settings.exact and math.prod(self.sizes) <= ENUMERATED
        self.all = list(itertools.product(*map(range, self.sizes))) if few else []
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=settings.rate, weight_decay=0.01)
        self.known: dict[tuple[int, Chosen], Outcome] = {}
        self.curve: list[dict[str, Any]] = []
        self.training, self.held = _divided(prompts, settings)
        self.best = (-math.inf, 0, self._copy())
        self.tradeoffs = torch.tensor(settings.tradeoffs)
        self.whole = True  # whether `state` can be taken: not in the midst of a change
        self._left: list[int] | None = None  # pictures of the pass under way
        self._drawn = self.generator.get_state()  # before anything was drawn for the next of them

    @property
    def epoch(self) -> int:
        """Passes over."""
        return max(len(self.curve) - 1, 0)

    @property
    def best_row(self) -> dict[str, Any]:
        """The row of the best pass."""
        return self.curve[self.best[1]]

    @property
    def over(self) -> bool:
        """Whether all passes are over, or it has not become better for long."""
        return self.epoch >= self.settings.epochs or self.epoch - self.best[1] >= self.settings.patience

    def outcomes(self, pairs: Sequence[tuple[int, Chosen]]) -> list[Outcome]:
        """What choices do, each asked for once."""
        missing = sorted({pair for pair in pairs if pair not in self.known})
        if missing:
            self.known.update(zip(missing, self._ask(missing), strict=True))
        return [self.known[pair] for pair in pairs]

    def begin(self, candidates: Sequence[Chosen]) -> None:
        """Give, at every level, what is best for all pictures alike a head start.

        Args:
            candidates: Choices to compare; where everything is tried anyway, all are.
        """
        self.network.settle([
            (one.cells[None], one.places, None if one.text is None else one.text[None])
            for one in (self.readings[k] for k in self.training)])
        candidates = self.all or list(candidates)
        pictures = self.training if self.all else self.training[:_WARM]
        self.outcomes([(picture, chosen) for picture in (range(len(self.readings)) if self.all else pictures)
                       for chosen in candidates])
        bias = self.network.out.bias.data.view(len(self.tradeoffs), -1)
        for level, reward in enumerate(self._rewards(pictures, candidates).mean(0).T):
            at = 0
            for size, index in zip(self.sizes, candidates[int(reward.argmax())], strict=True):
                bias[level, at + index] += (_HINT if self.all else _BIAS) if size > 1 else 0.0
                at += size
        self._judge()

    def step(self) -> dict[str, Any]:
        """One pass over the training pictures; returns the new row of the curve."""
        if self._left is None:
            order = torch.randperm(len(self.training), generator=self.generator).tolist()
            self._left, self._drawn = [self.training[k] for k in order], self.generator.get_state()
        while self._left:
            pictures, left = self._left[: self.settings.pictures], self._left[self.settings.pictures :]
            loss = self._exact_loss(pictures) if self.all else self._sampled_loss(pictures)
            self.optimiser.zero_grad()
            loss.backward()
            with self._change():
                self.optimiser.step()
                self._left, self._drawn = left, self.generator.get_state()
        return self._judge()

    def _judge(self) -> dict[str, Any]:
        """The pass is over: a new row of the curve; the best so far is kept. Levels count alike, whatever their weight."""
        measured = self.measured()
        with self._change():
            self.curve.append({"epoch": len(self.curve), **measured})
            held = torch.tensor(self.curve[-1]["held_out"])
            score = float((held / (1 + self.tradeoffs)).mean()) if held.isfinite().all() else -math.inf
            if score > self.best[0]:
                self.best = (score, self.epoch, self._copy())
            self._left = None
        return self.curve[-1]

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """What happens inside belongs together; after an interruption in its midst the state is of no use."""
        self.whole = False
        yield
        self.whole = True

    def measured(self) -> dict[str, list[float]]:
        """Mean rewards of what is likeliest, for every level: on training and held-out pictures; and the mean cut."""
        training, cut = self._greedy(self.training)
        held = self._greedy(self.held)[0] if self.held else training
        return {"reward": training, "held_out": held, "cut": cut}

    def alike(self) -> list[float]:
        """Mean reward on held-out pictures of the one choice that is best for the training pictures, for every level."""
        if not self.all:
            return []
        best = self._rewards(self.training, self.all).mean(0).argmax(0)
        held = self._rewards(self.held or self.training, self.all).mean(0)
        return [float(held[index, level]) for level, index in enumerate(best.tolist())]

    def finished(self) -> tuple[AdaptivePolicy, list[int]]:
        """The policy of the best pass, its levels in the order of their cuts; and that order."""
        self.network.load_state_dict(self.best[2])
        cuts = self.measured()["cut"]
        order = sorted(range(len(cuts)), key=lambda level: cuts[level])
        with torch.no_grad():
            for parameter in (self.network.out.weight, self.network.out.bias):
                rows = parameter.view(len(cuts), self.policy.choices, -1)
                rows.copy_(rows[order].clone())
        self.network.eval().requires_grad_(False)
        return dataclasses.replace(self.policy, cuts=tuple(round(cuts[level], 6) for level in order)), order

    def state(self) -> dict[str, Any]:
        """All that is needed to go on exactly, also from the middle of a pass."""
        return {
            "network": self._copy(), "optimiser": self.optimiser.state_dict(), "generator": self._drawn, "left": self._left,
            "best": list(self.best), "curve": self.curve,
            "known": [[picture, list(chosen), *outcome] for (picture, chosen), outcome in self.known.items()],
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self._left, self._drawn = state["left"], self.generator.get_state()
        self.best, self.curve = tuple(state["best"]), list(state["curve"])
        self.recall(state["known"])

    def recall(self, known: Sequence[Sequence[Any]]) -> None:
        """Take over outcomes as `state` gives them."""
        self.known |= {(picture, tuple(chosen)): Outcome(quality, cut) for picture, chosen, quality, cut in known}

    def logits(self, pictures: Sequence[int]) -> Tensor:
        """[pictures, levels, choices]."""
        found: dict[int, Tensor] = {}
        shapes = [(self.readings[k].cells.shape, None if (text := self.readings[k].text) is None else text.shape)
                  for k in pictures]
        for shape in dict.fromkeys(shapes):
            alike = [k for k, of in zip(pictures, shapes, strict=True) if of == shape]
            texts = [text for k in alike if (text := self.readings[k].text) is not None]
            rows = self.network(torch.stack([self.readings[k].cells for k in alike]), self.readings[alike[0]].places,
                                torch.stack(texts) if texts else None)
            found.update(zip(alike, rows, strict=True))
        return torch.stack([found[k] for k in pictures]).view(len(pictures), len(self.tradeoffs), self.policy.choices)

    def _exact_loss(self, pictures: Sequence[int]) -> Tensor:
        """Minus the expected reward and some entropy, mean over pictures, sum over levels.

        A reward counts in units of what there is to gain, at its level, over one choice for all pictures. Without the entropy,
        which fades, the first good choice would soon be all that has a chance.
        """
        rewards = self._rewards(pictures, self.all)  # [pictures, choices in all, levels]
        rewards = (rewards - rewards.mean(1, keepdim=True) if self.settings.baseline else rewards) / self._gap
        parts = [part.log_softmax(2) for part in self.logits(pictures).split(self.sizes, 2)]
        logs = torch.stack([
            sum((part[:, :, index] for part, index in zip(parts, chosen, strict=True)), torch.zeros(())) for chosen in self.all
        ], 1)
        first, last = _ENTROPY
        entropy = first + (last - first) * min(2 * self.epoch / self.settings.epochs, 1)
        return -(logs.exp() * (rewards - entropy * logs)).sum((1, 2)).mean()

    @functools.cached_property
    def _gap(self) -> Tensor:
        """[levels]: mean reward of the best choice for each training picture, less that of the best for all of them."""
        rewards = self._rewards(self.training, self.all)
        return (rewards.amax(1).mean(0) - rewards.mean(0).amax(0)).clamp(min=_LEAST_GAP)

    def _sampled_loss(self, pictures: Sequence[int]) -> Tensor:
        """REINFORCE: minus the advantage times the logarithm of the chance, mean over pictures and group."""
        parts = [part.log_softmax(2) for part in self.logits(pictures).split(self.sizes, 2)]
        levels, group = len(self.tradeoffs), self.settings.group
        drawn = torch.stack([
            torch.multinomial(part.detach().exp().flatten(0, 1), group, replacement=True, generator=self.generator)
            for part in parts
        ], 2).unflatten(0, (len(pictures), levels))  # [pictures, levels, group, segments]
        pairs = [(picture, tuple(chosen)) for picture, of in zip(pictures, drawn.flatten(1, 2).tolist(), strict=True)
                 for chosen in of]
        outcomes = torch.tensor(self.outcomes(pairs)).view(len(pictures), levels, group, 2)
        rewards = (outcomes[..., 1] + self.tradeoffs[:, None] * outcomes[..., 0]) / (1 + self.tradeoffs[:, None])
        if self.settings.baseline:
            rewards = rewards - rewards.mean(2, keepdim=True)
        chance = sum((part.gather(2, drawn[..., j]) for j, part in enumerate(parts)), torch.zeros(()))
        return -(rewards * chance).mean(2).sum(1).mean()

    def _rewards(self, pictures: Sequence[int], choices: Sequence[Chosen]) -> Tensor:
        """[pictures, choices, levels]."""
        outcomes = torch.tensor(self.outcomes([(picture, chosen) for picture in pictures for chosen in choices]))
        outcomes = outcomes.view(len(pictures), len(choices), 2)
        return outcomes[..., 1:] + outcomes[..., :1] * self.tradeoffs

    @torch.no_grad()
    def _greedy(self, pictures: Sequence[int]) -> tuple[list[float], list[float]]:
        """Mean reward and mean cut of what is likeliest, for every level."""
        chosen = [[self.policy.likeliest(row) for row in rows] for rows in self.logits(pictures)]
        pairs = [(picture, one) for picture, of in zip(pictures, chosen, strict=True) for one in of]
        outcomes = torch.tensor(self.outcomes(pairs)).view(len(pictures), -1, 2)
        rewards = outcomes[..., 1] + self.tradeoffs * outcomes[..., 0]
        return rewards.mean(0).tolist(), outcomes[..., 1].mean(0).tolist()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}


def _divided(prompts: Sequence[int], settings: Settings) -> tuple[list[int], list[int]]:
    """Pictures to train on, and those held out, by prompts; at least one prompt of each where there are two."""
    names = sorted(set(prompts))
    count = min(max(round(settings.held_out * len(names)), int(settings.held_out > 0)), len(names) - 1)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    held = {names[k] for k in order[:count]}
    return ([k for k, prompt in enumerate(prompts) if prompt not in held],
            [k for k, prompt in enumerate(prompts) if prompt in held])
