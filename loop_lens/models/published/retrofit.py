"""Retrofitted recurrence (McLeish et al., arXiv 2511.07384): Llama-3.2, TinyLlama, OLMo-2.

They carry Huginn's ``model_type`` and class name, but have their base model's blocks, no norm
between loop and coda, and rotate-half RoPE.
"""

from __future__ import annotations

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.published.base import Config, Family, rope_parameters
from loop_lens.models.published.raven import MODEL_TYPE, raven_config, raven_entries
from loop_lens.models.published.weights import Entry, same


def _has_huginn_norms(keys: frozenset[str]) -> bool:
    return any(key.endswith(".norm_3.weight") for key in keys)


def _has_qk_norm(keys: frozenset[str]) -> bool:
    return any(key.endswith(".attn.q_norm.weight") for key in keys)


def _is_retrofit(config: Config, keys: frozenset[str]) -> bool:
    return config.get("model_type") == MODEL_TYPE and bool(keys) and not _has_huginn_norms(keys)


def _llama_config(published: Config) -> LoopedConfig:
    return raven_config(
        published,
        block_norm="pre",
        max_position_embeddings=published.get("max_position_embeddings", 131072),
        rope_parameters=rope_parameters(published, 500000.0),
        family="retrofit_llama",
    )


def _olmo_config(published: Config) -> LoopedConfig:
    return raven_config(
        published,
        block_norm="post_branch",
        qk_norm="full",
        max_position_embeddings=published.get("max_position_embeddings", 4096),
        rope_parameters=rope_parameters(published, 500000.0),
        family="retrofit_olmo",
    )


def _llama_entries(config: LoopedConfig) -> list[Entry]:
    return raven_entries(config, {"norm_1": "attn_norm", "norm_2": "mlp_norm"}, interleaved=False)


def _olmo_entries(config: LoopedConfig) -> list[Entry]:
    norms = {"norm_1": "attn_post_norm", "norm_2": "mlp_post_norm"}
    entries = raven_entries(config, norms, interleaved=False)
    segments = (("prelude", "prelude"), ("core_block", "core"), ("coda", "coda"))
    for theirs, ours in segments:
        for i in range(getattr(config, f"{ours}_layers")):
            old, new = f"transformer.{theirs}.{i}.attn", f"model.{ours}.{i}.self_attn"
            entries += [same(f"{old}.{n}_norm.weight", f"{new}.{n}_norm.weight") for n in "qk"]
    return entries


RETROFIT_LLAMA = Family(
    name="retrofit_llama",
    model_type=MODEL_TYPE,
    hub_ids=(
        "smcleish/Recurrent-Llama-3.2-train-recurrence-32",
        "smcleish/Recurrent-TinyLlama-3T-train-recurrence-32",
    ),
    matches=lambda config, keys: _is_retrofit(config, keys) and not _has_qk_norm(keys),
    config=_llama_config,
    entries=_llama_entries,
)

RETROFIT_OLMO = Family(
    name="retrofit_olmo",
    model_type=MODEL_TYPE,
    hub_ids=("smcleish/Recurrent-OLMo-2-0425-train-recurrence-32",),
    matches=lambda config, keys: _is_retrofit(config, keys) and _has_qk_norm(keys),
    config=_olmo_config,
    entries=_olmo_entries,
    prepends_bos=False,
)
