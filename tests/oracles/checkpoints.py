"""Random checkpoints in the published formats, of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"


def golden(family: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Config, weights and expected values of a golden fixture."""
    folder = GOLDENS / family
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def random_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    d_model: int = 32,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_mlp: int = 40,
    vocab: int = 50,
    prelude: int = 1,
    core: int = 2,
    coda: int = 1,
    recurrences: int = 3,
    low: int = 2,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a checkpoint with other sizes than the golden's; returns its config and weights.

    Shapes follow from the golden's by replacing sizes; norm weights and biases are random.
    """
    config, weights, _ = golden(family)
    n_kv = n_kv_heads or (n_heads if family in ("huginn", "ouro", "hrm_text") else n_heads // 2)
    d_head = d_model // n_heads
    if family in ("ouro", "hrm_text"):
        config |= {
            "hidden_size": d_model,
            "num_attention_heads": n_heads,
            "num_key_value_heads": n_kv,
            "head_dim": d_head,
            "intermediate_size": d_mlp,
            "vocab_size": vocab,
        }
        if family == "ouro":
            config |= {"num_hidden_layers": core, "total_ut_steps": recurrences, "layer_types": None}
            stacks = {"model.layers": core}
        else:
            cycles = {"H_cycles": recurrences, "L_cycles": low, "num_layers_per_stack": core}
            config |= cycles | {"num_hidden_layers": core * recurrences * (low + 1)}
            config.pop("num_key_value_heads")
            stacks = {"model.L_module.layers": core, "model.H_module.layers": core}
        qkv = {"q_proj": n_heads, "k_proj": n_kv, "v_proj": n_kv, "gate_proj": n_heads}
    else:
        config |= {
            "n_embd": d_model,
            "n_heads": n_heads,
            "num_key_value_heads": n_kv,
            "head_dim": d_head,
            "intermediate_size": d_mlp,
            "vocab_size": vocab,
            "padded_vocab_size": vocab,
            "n_layers": prelude + core + coda,
            "n_layers_in_prelude": prelude,
            "n_layers_in_recurrent_block": core,
            "n_layers_in_coda": coda,
            "mean_recurrence": recurrences,
        }
        stacks = {"transformer.prelude": prelude, "transformer.core_block": core, "transformer.coda": coda}
        qkv = {}

    def shape(name: str, old: Tensor) -> tuple[int, ...]:
        key = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith("attn.Wqkv.weight"):
            return ((n_heads + 2 * n_kv) * d_head, d_model)
        if name.endswith("attn.qk_bias"):
            return (2, 1, n_heads, d_head)
        if ".mlp." in name:
            wide = {"fc": (2 * d_mlp, d_model), "proj": (d_model, d_mlp), "down_proj": (d_model, d_mlp)}
            return wide.get(key, (d_mlp, d_model))
        if "self_attn" in name and key in qkv:
            return (qkv[key] * d_head, d_model)
        if key in ("o_proj", "proj"):
            return (d_model, n_heads * d_head)
        if key in ("q_norm", "k_norm"):
            return ((n_heads if key == "q_norm" else n_kv) * d_head,)
        if key == "adapter":
            return (d_model, 2 * d_model)
        if key in ("wte", "embed_tokens", "lm_head"):
            return (vocab, d_model)
        if key == "early_exit_gate":
            return (1, d_model)
        return tuple(old.shape) if name.endswith("bias") else (d_model,)

    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, old in weights.items():
        names = [name]
        for stack in stacks:
            if name.startswith(f"{stack}.0."):
                names = [name.replace(f"{stack}.0.", f"{stack}.{i}.", 1) for i in range(stacks[stack])]
            elif name.startswith(f"{stack}."):
                names = []
        for each in names:
            if each == "freqs_cis":
                frequencies = config["rope_base"] ** (-torch.arange(0, d_head, 2).float() / d_head)
                angles = torch.outer(torch.arange(config["block_size"]).float(), frequencies)
                made[each] = torch.stack([angles.cos(), angles.sin()], -1)[None, :, None]
                continue
            size = shape(each, old)
            noise = torch.randn(size, generator=generator)
            is_norm = len(size) == 1 and not each.endswith(("bias", "z_L_init"))
            made[each] = (
                1 + 0.3 * noise if is_norm else noise * (0.3 if len(size) != 2 else 0.5 * size[1] ** -0.5)
            )
    if config.get("tie_embeddings"):
        made["lm_head.weight"] = made["transformer.wte.weight"].clone()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, folder / "model.safetensors")
    return config, made
