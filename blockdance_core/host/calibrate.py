"""From a profile to a policy file: search, proof, and a place among what the file holds already."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from blockdance_core.config import ConfigError
from blockdance_core.host.attach import kind_of
from blockdance_core.host.measured import Measured
from blockdance_core.host.rollout import Prompt, Rollouts
from blockdance_core.host.search import CUTS, TOLERANCE, Checked, best_schedules, entry, reaching, table
from blockdance_core.host.versions import versions
from blockdance_core.policy import Calibrated, SchedulePolicy, load, save

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def calibrate(
    measured: Measured, path: str | os.PathLike[str], cuts: Sequence[float] = CUTS, fidelity: float = 0.0, tries: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None, checks: Sequence[Prompt] = (),
    proofs: Sequence[Prompt] = (), about: Mapping[str, Any] = MappingProxyType({}), add: bool = False,
) -> tuple[SchedulePolicy, dict[str, Any]]:
    """Find the schedules of a profile, prove them, and add them to a policy file; those that it has already are tried, too.

    Args:
        measured: What reuse costs.
        path: The policy file.
        cuts: Shares of the time to save.
        fidelity: Keep the schedule alone that saves most of those that reach so many dB; 0 keeps all.
        tries: See `best_schedules`.
        progress: Told how many of how many parts are done.
        checks: Further prompts to choose them on; none for those of the profile.
        proofs: Further prompts to prove them on; none for those that they were chosen on.
        about: What the record is to say besides, as plain JSON data.
        add: Keep what the file holds for other cuts.

    Returns:
        The policy as it stands in the file, and what was found as plain JSON data.

    Raises:
        ConfigError: The file is there already, and damaged or for another model.
        ValueError: There is no such schedule, or a cut is no share.
    """
    for cut in cuts:
        if not 0 < cut < 1:
            raise ValueError(f"cut = {cut} is not valid: expected a share of the time above 0 and below 1.")
    policy, first = policy_in(path, measured.model), measured.prompts[0]
    nothing = Checked((None,) * measured.profile.steps, 0.0, 0.0, 0.0)
    key = entry(measured.model, first, [nothing]).key
    before = [plan for one in policy.entries if one.key == key for plan in one.plans] if policy else []
    begun = time.perf_counter()
    rollouts: list[Rollouts] = []
    for prompt in (*(checks or measured.prompts), *proofs):
        rollouts.append(Rollouts(measured.model, prompt))
        rollouts[-1].forget()
    held = len(rollouts) - len(proofs)
    found = best_schedules(measured.profile, rollouts[:held], cuts, tries, progress, before, rollouts[held:])
    if not found:
        raise ValueError(f"No schedule of {measured.profile.steps} steps saves a share of the time near {list(cuts)}.")
    found = reaching(found, fidelity) if fidelity else found
    report = {
        "levels": table(found),
        "cost": {
            "rollouts": measured.rollouts + sum(one.count for one in rollouts),
            "calls": measured.calls + sum(one.calls for one in rollouts),
            "seconds": round(measured.seconds + time.perf_counter() - begun, 2),
        },
    }
    record = {
        **measured.report(), "cfg": first.cfg, "fidelity_db": fidelity, "versions": versions(), **report, **about,
    }
    policy = keep(path, measured.model, entry(measured.model, first, found), record, cuts if add else ())
    return policy, {**report, "path": str(path)}


def keep(
    path: str | os.PathLike[str], model: ModelPatcher, calibration: Calibrated, record: Mapping[str, Any],
    add: Sequence[float] = (),
) -> SchedulePolicy:
    """Add a calibration to a policy file, or make the file. It replaces one of the same `Calibrated.key`.

    Args:
        path: The policy file.
        model: MODEL that was calibrated.
        calibration: What was found.
        record: How, as plain JSON data.
        add: The cuts that were wanted, to keep what one of the same key holds for others. Its record stays, with this one
            under `added`.

    Returns:
        The policy as it stands in the file.
    """
    path, key = Path(path), calibration.key
    before = policy_in(path, model)
    entries = before.entries if before else ()
    for other in (one for one in entries if add and one.key == key):
        calibration = calibration.joined(other, add, TOLERANCE)
    policy = SchedulePolicy(path.stem, *kind_of(model), (calibration,)) if before is None else before.extended(calibration)
    records = dict(policy.record.get("calibrations", {}))
    whole = add and records.get(key)
    records[key] = {**whole, "added": [*whole.get("added", ()), dict(record)]} if whole else dict(record)
    save(dataclasses.replace(policy, record={**policy.record, "calibrations": records}), path)
    written = policy_in(path, model)
    assert written is not None
    return written


def policy_in(path: str | os.PathLike[str], model: ModelPatcher) -> SchedulePolicy | None:
    """The policy that is in a file, None if there is no file.

    Raises:
        ConfigError: The file is damaged, or for another model.
    """
    if not os.path.lexists(path):
        return None
    policy = load(path)
    if not isinstance(policy, SchedulePolicy):
        raise ConfigError(f"The policy file {path} holds a decision network: calibrations go into another file. Choose another "
                          "name.")
    policy.check(*kind_of(model))
    return policy
