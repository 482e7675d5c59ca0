"""Forward passes of the published families, from their equations, on published weights.

Plain functions on tensors; nothing of the package and nothing of transformers' models is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class ReferenceRun:
    """What one forward computed, in the order in which it happened."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    firings: list[Tensor] = field(default_factory=list)
    states_in: list[Tensor] = field(default_factory=list)
    injected: list[Tensor] = field(default_factory=list)
    states_out: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    prelude_out: Tensor | None = None


def reference_forward(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    tokens: Tensor,
    *,
    initial_state: Tensor | None = None,
    recurrences: int | None = None,
) -> ReferenceRun:
    """Run a published checkpoint."""
    if config["model_type"] == "ouro":
        return _ouro(config, weights, tokens, recurrences or config["total_ut_steps"])
    if config["model_type"] == "hrm_text":
        return _hrm(config, weights, tokens, recurrences or config["H_cycles"])
    assert initial_state is not None
    return _raven(config, weights, tokens, initial_state, recurrences or config["mean_recurrence"])


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def _angles(n: int, d_head: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.outer(torch.arange(n).float(), frequencies)
    return angles.cos(), angles.sin()


def _rope(x: Tensor, theta: float, *, interleaved: bool) -> Tensor:
    """Rotate [batch head pos d_head]."""
    cos, sin = (table.to(x.dtype) for table in _angles(x.shape[2], x.shape[3], theta))
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch pos head d_head] after grouping, as [batch pos head * d_head]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    n = scores.shape[-1]
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def _raven(
    c: dict[str, Any], w: dict[str, Tensor], tokens: Tensor, state: Tensor, steps: int
) -> ReferenceRun:
    huginn = any(".norm_3." in key for key in w)
    olmo = any(".q_norm." in key for key in w)
    n, eps = c["n_heads"], c["norm_eps"]
    n_kv = c["num_key_value_heads"]
    d_head = w["transformer.core_block.0.attn.proj.weight"].shape[1] // n
    theta = c["rope_base"] if huginn else c["rope_parameters"]["rope_theta"]
    run = ReferenceRun()

    def block(x: Tensor, name: str) -> Tensor:
        def p(key: str) -> Tensor:
            return w[f"transformer.{name}.{key}"]

        def attention(h: Tensor) -> Tensor:
            sizes = [n * d_head, n_kv * d_head, n_kv * d_head]
            q, k, v = (h @ p("attn.Wqkv.weight").T).split(sizes, -1)
            if olmo:
                q, k = _rms(q, p("attn.q_norm.weight"), eps), _rms(k, p("attn.k_norm.weight"), eps)
            if huginn:
                bias = p("attn.qk_bias")
                q, k = q + bias[0].flatten(), k + bias[1].flatten()
            q, k, v = _heads(q, n), _heads(k, n_kv), _heads(v, n_kv)
            q, k = _rope(q, theta, interleaved=huginn), _rope(k, theta, interleaved=huginn)
            return _attend(q, k, v) @ p("attn.proj.weight").T

        def mlp(h: Tensor) -> Tensor:
            gate, up = (h @ p("mlp.fc.weight").T).chunk(2, -1)
            return (torch.nn.functional.silu(gate) * up) @ p("mlp.proj.weight").T

        def norm(h: Tensor, i: int) -> Tensor:
            return _rms(h, p(f"norm_{i}.weight"), eps)

        if huginn:
            x = norm(attention(norm(x, 1)) + x, 2)
            x = norm(mlp(norm(x, 3)) + x, 4)
        elif olmo:
            x = x + norm(attention(x), 1)
            x = x + norm(mlp(x), 2)
        else:
            x = x + attention(norm(x, 1))
            x = x + mlp(norm(x, 2))
        run.firings.append(x)
        return x

    e = w["transformer.wte.weight"][tokens] * c["init_values"]["embed_scale"]
    for i in range(c["n_layers_in_prelude"]):
        e = block(e, f"prelude.{i}")
    run.prelude_out = e
    for _ in range(steps):
        run.states_in.append(state)
        state = torch.cat([state, e], -1) @ w["transformer.adapter.weight"].T
        run.injected.append(state)
        for i in range(c["n_layers_in_recurrent_block"]):
            state = block(state, f"core_block.{i}")
        run.states_out.append(state)
    final = w["transformer.ln_f.weight"]
    if huginn:
        state = _rms(state, final, eps)
    for i in range(c["n_layers_in_coda"]):
        state = block(state, f"coda.{i}")
    run.logits = _rms(state, final, eps) @ w["lm_head.weight"].T
    return run


def _llama_like(
    h: Tensor, w: dict[str, Tensor], name: str, n: int, n_kv: int, theta: float, *, gated: bool
) -> Tensor:
    q, k, v = (h @ w[f"{name}.self_attn.{p}_proj.weight"].T for p in "qkv")
    q, k, v = _heads(q, n), _heads(k, n_kv), _heads(v, n_kv)
    out = _attend(_rope(q, theta, interleaved=False), _rope(k, theta, interleaved=False), v)
    if gated:
        out = out * torch.sigmoid(h @ w[f"{name}.self_attn.gate_proj.weight"].T)
    return out @ w[f"{name}.self_attn.o_proj.weight"].T


def _swiglu(h: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    gate, up = h @ w[f"{name}.mlp.gate_proj.weight"].T, h @ w[f"{name}.mlp.up_proj.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ w[f"{name}.mlp.down_proj.weight"].T


def _ouro(c: dict[str, Any], w: dict[str, Tensor], tokens: Tensor, steps: int) -> ReferenceRun:
    run, eps = ReferenceRun(), c["rms_norm_eps"]
    n, n_kv, theta = c["num_attention_heads"], c["num_key_value_heads"], c["rope_parameters"]["rope_theta"]
    h = w["model.embed_tokens.weight"][tokens]
    for _ in range(steps):
        run.states_in.append(h)
        for i in range(c["num_hidden_layers"]):
            name = f"model.layers.{i}"

            def norm(x: Tensor, key: str, name: str = name) -> Tensor:
                return _rms(x, w[f"{name}.{key}.weight"], eps)

            branch = _llama_like(norm(h, "input_layernorm"), w, name, n, n_kv, theta, gated=False)
            h = h + norm(branch, "input_layernorm_2")
            branch = _swiglu(norm(h, "post_attention_layernorm"), w, name)
            h = h + norm(branch, "post_attention_layernorm_2")
            run.firings.append(h)
        h = _rms(h, w["model.norm.weight"], eps)
        run.states_out.append(h)
        gate = h @ w["model.early_exit_gate.weight"].T + w["model.early_exit_gate.bias"]
        run.gates.append(gate[..., 0])
    run.logits = h @ w["lm_head.weight"].T
    return run


def _hrm(c: dict[str, Any], w: dict[str, Tensor], tokens: Tensor, high_cycles: int) -> ReferenceRun:
    run, eps = ReferenceRun(), c["rms_norm_eps"]
    n, theta = c["num_attention_heads"], c["rope_parameters"]["rope_theta"]

    def stack(x: Tensor, which: str) -> Tensor:
        run.injected.append(x)
        for i in range(c["num_layers_per_stack"]):
            name = f"model.{which}_module.layers.{i}"
            x = x + _llama_like(_rms(x, None, eps), w, name, n, n, theta, gated=True)
            x = x + _swiglu(_rms(x, None, eps), w, name)
            run.firings.append(x)
        x = _rms(x, None, eps)
        run.states_out.append(x)
        return x

    high = w["model.embed_tokens.weight"][tokens] * c["embedding_scale"]
    low = w["model.z_L_init"].expand_as(high)
    for _ in range(high_cycles):
        for _ in range(c["L_cycles"]):
            run.states_in.append(low)
            low = stack(low + high, "L")
        run.states_in.append(high)
        high = stack(high + low, "H")
    run.logits = high @ w["lm_head.weight"].T
    return run
