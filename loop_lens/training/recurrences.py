"""How many iterations a training step runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from loop_lens.unrolling.numbers import whole


class Recurrences(ABC):
    """A rule for the number of iterations of one step.

    Example:
        >>> from loop_lens.training import Fixed, Recurrences, Uniform
        >>> isinstance(Fixed(4), Recurrences), Fixed(4).constant, Uniform(2, 6).constant
        (True, 4, None)
    """

    @abstractmethod
    def draw(self, generator: torch.Generator, *, level: int, fraction: float = 1.0) -> int:
        """Draw a number of iterations, at least 1.

        Args:
            generator: Source of randomness, on the CPU.
            level: The task's level of difficulty, from 1.
            fraction: How much of the full number of iterations to use, above 0 and up to 1.
        """

    @property
    @abstractmethod
    def constant(self) -> int | None:
        """The number that every draw gives, None where it varies."""


@dataclass(frozen=True)
class Fixed(Recurrences):
    """Always the same number.

    Attributes:
        n: The number of iterations.

    Example:
        >>> from loop_lens.training import Fixed
        >>> Fixed(8).draw(torch.Generator(), level=1, fraction=0.5)
        4
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole(self.n, "the number of iterations of Fixed", 1))

    def draw(self, generator: torch.Generator, *, level: int, fraction: float = 1.0) -> int:
        """The number, or a fraction of it, rounded up."""
        return _part(self.n, fraction)

    @property
    def constant(self) -> int | None:
        """The number."""
        return self.n


@dataclass(frozen=True)
class Uniform(Recurrences):
    """Every number of a range alike.

    Attributes:
        low: The smallest number.
        high: The largest number.
        per_level: Added to both for each level: ``Uniform(1, 3, per_level=1)`` draws from h+1 to h+3 at
            level h.

    Example:
        >>> from loop_lens.training import Uniform
        >>> rule, generator = Uniform(1, 3, per_level=1), torch.Generator().manual_seed(0)
        >>> sorted({rule.draw(generator, level=4) for _ in range(50)})
        [5, 6, 7]
    """

    low: int
    high: int
    per_level: int = 0

    def __post_init__(self) -> None:
        for name in ("low", "high", "per_level"):
            object.__setattr__(self, name, whole(getattr(self, name), name))
        if self.low > self.high:
            raise ValueError(f"Uniform({self.low}, {self.high}) is empty: low must not be above high")
        if self.low + self.per_level < 1 or self.per_level < 0:
            raise ValueError(
                f"{self} draws {self.low + self.per_level} iterations at level 1: the smallest number must be "
                "at least 1 and per_level not negative"
            )

    def draw(self, generator: torch.Generator, *, level: int, fraction: float = 1.0) -> int:
        """A number of the range, or a fraction of it, rounded up."""
        n = int(torch.randint(self.low, self.high + 1, (), generator=generator))
        return _part(n + self.per_level * level, fraction)

    @property
    def constant(self) -> int | None:
        """The number, where the range is one number."""
        return self.low if self.low == self.high and not self.per_level else None


@dataclass(frozen=True)
class LogNormalPoisson(Recurrences):
    """One more than a Poisson number whose rate is log-normal: mostly few iterations, sometimes many.

    With tau ~ N(log(mean) - sigma^2 / 2, sigma) the number is Poisson(exp(tau)) + 1, so its expectation is
    mean + 1 and its variance mean + mean^2 (exp(sigma^2) - 1).

    Attributes:
        mean: Expectation of the rate.
        sigma: Standard deviation of the rate's logarithm.
        most: Numbers above this one become this one; None for no limit.

    Source:
        Geiping et al., arXiv 2502.05171, section 3.3 (r-bar 32, sigma 0.5). The limit is ours.

    Example:
        >>> from loop_lens.training import LogNormalPoisson
        >>> rule, generator = LogNormalPoisson(mean=8, most=16), torch.Generator().manual_seed(0)
        >>> 1 <= min(rule.draw(generator, level=1) for _ in range(50)) < 8
        True
    """

    mean: float
    sigma: float = 0.5
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.mean > 0 or not math.isfinite(self.mean):
            raise ValueError(f"the mean number of iterations must be above 0, got {self.mean}")
        if self.sigma < 0:
            raise ValueError(f"sigma must not be negative, got {self.sigma}")
        if self.most is not None:
            object.__setattr__(self, "most", whole(self.most, "most", 1))

    def draw(self, generator: torch.Generator, *, level: int, fraction: float = 1.0) -> int:
        """A number whose mean is a fraction of the full one."""
        normal = torch.randn((), generator=generator, dtype=torch.float64)
        rate = torch.exp(math.log(self.mean * fraction) - self.sigma**2 / 2 + self.sigma * normal)
        n = int(torch.poisson(rate, generator=generator)) + 1
        return n if self.most is None else min(n, self.most)

    @property
    def constant(self) -> int | None:
        """None: the number varies."""
        return None


def _part(n: int, fraction: float) -> int:
    return max(1, math.ceil(n * fraction - 1e-9))


@dataclass(frozen=True)
class Ramp:
    """Iterations that grow over the first steps of a training.

    Attributes:
        steps: After this many steps the full number runs.
        shape: ``"linear"``, or ``"1-sqrt"``: 1 - sqrt(1 - step / steps), slow first.

    Source:
        The shape "1-sqrt": McLeish et al., arXiv 2511.07384.

    Example:
        >>> from loop_lens.training import Ramp
        >>> [Ramp(steps=10).fraction(step) for step in (0, 4, 9, 50)]
        [0.1, 0.5, 1.0, 1.0]
    """

    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole(self.steps, "a ramp needs at least one step: steps", 1))
        if self.shape not in ("linear", "1-sqrt"):
            raise ValueError(f"ramp shape {self.shape!r} is unknown: choose 'linear' or '1-sqrt'")

    def fraction(self, step: int) -> float:
        """How much of the full number of iterations a step (from 0) runs."""
        done = min(1.0, (step + 1) / self.steps)
        return done if self.shape == "linear" else 1.0 - math.sqrt(1.0 - done)
