"""Published families of looped models, each in a file of its own."""

from __future__ import annotations

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Family
from loop_lens.models.published.huginn import HUGINN
from loop_lens.models.published.ouro import OURO
from loop_lens.models.published.retrofit import RETROFIT_LLAMA, RETROFIT_OLMO

FAMILIES: tuple[Family, ...] = (HUGINN, OURO, RETROFIT_LLAMA, RETROFIT_OLMO)
"""Families that map onto the native model."""


def family_of(config: LoopedConfig) -> Family | None:
    """The published family that a native model came from."""
    return next((family for family in FAMILIES if family.name == config.family), None)
