"""Stages of inference: what attention and the residual stream do at each depth."""

from loop_lens.stages.agreement import StageAgreement, stage_agreement
from loop_lens.stages.mixing import anisotropy, colsum_concentration, matrix_entropy, mixing_score, sink_rate
from loop_lens.stages.neurons import NeuronFractions, prediction_neurons
from loop_lens.stages.probe import StagesProbe, stages
from loop_lens.stages.result import Stages

__all__ = [
    "NeuronFractions",
    "StageAgreement",
    "Stages",
    "StagesProbe",
    "anisotropy",
    "colsum_concentration",
    "matrix_entropy",
    "mixing_score",
    "prediction_neurons",
    "sink_rate",
    "stage_agreement",
    "stages",
]
