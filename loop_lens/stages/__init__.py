"""Stages of inference: what attention and the residual stream do at each depth."""

from loop_lens.stages.mixing import colsum_concentration, matrix_entropy, mixing_score, sink_rate

__all__ = ["colsum_concentration", "matrix_entropy", "mixing_score", "sink_rate"]
