"""Streams that are not one sum, and what says so."""

from __future__ import annotations

from typing import NoReturn


class NonAdditiveStreamError(ValueError):
    """A decomposition that assumes one additive residual stream, asked of a model without one.

    Example:
        >>> _, cache = model.run_with_cache(prompt)
        >>> try:
        ...     cache.decompose_resid()
        ... except loop_lens.NonAdditiveStreamError as error:
        ...     print(error)
        decompose_resid assumes that the residual stream is the sum of its components, but ...
    """


class NoScale(float):
    """In place of the factor with which a branch's output arrives downstream: there is no such one.

    Within its own block a branch counts once, so its value is 1; but it differs from every number,
    which is what transformer-lens' tools ask before they rely on a constant factor.
    """

    reason: str

    def __new__(cls, reason: str) -> NoScale:
        """Make one that prints as the reason."""
        new = super().__new__(cls, 1.0)
        new.reason = reason
        return new

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = float.__hash__

    def __format__(self, spec: str) -> str:
        return f"no constant factor: in this model {self.reason}"


def raise_non_additive(what: str, reason: str) -> NoReturn:
    """Refuse a decomposition with the reason why it would be wrong."""
    raise NonAdditiveStreamError(
        f"{what} assumes that the residual stream is the sum of its components, but in this model {reason}, "
        "so the sum would be wrong. Accumulated streams, lenses and patching are unaffected."
    )
