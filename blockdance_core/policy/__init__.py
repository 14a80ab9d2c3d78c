"""Policies: what says which steps of a run reuse, in place of a preset. They are data, kept in safetensors files."""

from __future__ import annotations

from blockdance_core.policy.adaptive import AdaptivePolicy
from blockdance_core.policy.calibrated import Calibrated, SchedulePolicy
from blockdance_core.policy.file import PolicyError, load, save
from blockdance_core.policy.fixed import Fixed

__all__ = ["AdaptivePolicy", "Calibrated", "Fixed", "PolicyError", "SchedulePolicy", "load", "save"]
