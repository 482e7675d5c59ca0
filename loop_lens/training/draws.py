"""Everything random in a training is a function of the seed and the step.

So a training that goes on from a checkpoint sees what it would have seen, and all processes agree.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from loop_lens.models.native.config import LoopedConfig

CUT = 3.0
"""Noise beyond this many standard deviations is drawn again, as `LoopedConfig.initial_state` says."""


def generator_of(seed: int, step: int, what: str) -> torch.Generator:
    """A generator for one purpose in one step."""
    return torch.Generator().manual_seed(number_of(seed, step, what))


def number_of(seed: int, step: int, what: str) -> int:
    """A seed of 32 bits for one purpose in one step."""
    # torch's CPU generator uses the low 32 bits of its seed; the digest spreads neighbouring steps over them.
    digest = blake2b(f"{seed}/{step}/{what}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def noise_state(
    config: LoopedConfig, shape: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "batch pos d_model"] | None:
    """A state drawn anew for every sequence and position, None where the loop does not start from noise.

    Args:
        config: The model's configuration.
        shape: Number of sequences and of positions.
        generator: Source of randomness, on the CPU.
    """
    if config.initial_state != "noise":
        return None
    state = torch.randn(*shape, config.hidden_size, generator=generator)
    outside = (state.abs() > CUT).flatten().nonzero().flatten()
    while len(outside):
        fresh = torch.randn(len(outside), generator=generator)
        state.view(-1)[outside] = fresh
        outside = outside[fresh.abs() > CUT]
    return state.mul_(config.initial_state_std)
