"""The native looped decoder: one configurable model for Huginn, Ouro, the retrofits and Parcae."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.state import InitialState, draw_initial_state
from loop_lens.unrolling.kv import CACHE_NAME
from loop_lens.unrolling.slots import tied_clone

Site = Callable[[str, Tensor], Tensor]


class ScaledEmbedding(nn.Embedding):
    """Token embedding times a constant."""

    def __init__(self, vocab_size: int, d_model: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(vocab_size, d_model, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Embed tokens [...] as [... d_model]."""
        embedded = super().forward(input)
        return embedded if self.scale == 1.0 else embedded * self.scale


class UnitRMSNorm(nn.Module):
    """RMS norm without weights over the last dimension."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm [... d]."""
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class LoopedAttention(nn.Module):
    """Causal self-attention with RoPE, grouped heads, and the families' qk-norms and biases."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        d_head, heads, kv_heads = (
            config.head_dim or 0,
            config.num_attention_heads,
            config.num_key_value_heads or 0,
        )
        self.head_dim, self.num_key_value_groups = d_head, heads // kv_heads
        self.scaling, self.attention_dropout = d_head**-0.5, config.attention_dropout
        qk_bias = config.qk_bias or config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * d_head, bias=qk_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * d_head, bias=qk_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * d_head, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * d_head, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm == "full":
            self.q_norm = LlamaRMSNorm(heads * d_head, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(kv_heads * d_head, config.rms_norm_eps)
        elif config.qk_norm == "head":
            self.q_norm = LlamaRMSNorm(d_head, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(d_head, config.rms_norm_eps)
        elif config.qk_norm == "head_after_rope":
            self.q_norm, self.k_norm = UnitRMSNorm(config.rms_norm_eps), UnitRMSNorm(config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within [batch pos d_model]; returns the output and, under eager, the pattern."""
        norm, shape = self.config.qk_norm, (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if norm == "head_after_rope":
            q, k = self.q_norm(q), self.k_norm(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        out, pattern = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), pattern


class LoopedMLP(nn.Module):
    """Gated or plain MLP."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        d_model, d_mlp, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.gated_mlp:
            self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch pos d_model] to itself."""
        if self.gated:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class LoopedBlock(GradientCheckpointingLayer):
    """One transformer block with the residual convention of its family."""

    def __init__(self, config: LoopedConfig, layer_idx: int) -> None:
        super().__init__()
        self.convention = config.block_norm
        self.self_attn = LoopedAttention(config, layer_idx)
        self.mlp = LoopedMLP(config)
        if self.convention != "post_branch":
            self.attn_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.convention != "pre":
            self.attn_post_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp_post_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map the stream [batch pos d_model] to itself."""
        x, convention = hidden_states, self.convention
        branch, _ = self.self_attn(x if convention == "post_branch" else self.attn_norm(x), **kwargs)
        if convention == "post_residual":
            x = self.attn_post_norm(branch + x)
        else:
            x = x + (branch if convention == "pre" else self.attn_post_norm(branch))
        branch = self.mlp(x if convention == "post_branch" else self.mlp_norm(x))
        if convention == "post_residual":
            return self.mlp_post_norm(branch + x)
        return x + (branch if convention == "pre" else self.mlp_post_norm(branch))


class LinearInjection(nn.Module):
    """W [state; e], the state first."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False)

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        return self.adapter(torch.cat([state, e.to(state.dtype)], dim=-1))


class AddInjection(nn.Module):
    """state + e."""

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        return state + e


class DiagonalInjection(nn.Module):
    """exp(-dt A) state + dt (e B^T), dt = softplus(dt_bias), A = exp(A_log), as in Parcae."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(d_model))
        self.dt_bias = nn.Parameter(torch.zeros(d_model))
        self.B = nn.Parameter(torch.eye(d_model))

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        """Mix two streams [batch pos d_model]."""
        dt = nn.functional.softplus(self.dt_bias)
        return torch.exp(-dt * torch.exp(self.A_log)) * state + dt * (e @ self.B.T)


@dataclass
class LoopedOutput(CausalLMOutputWithPast):
    """What a looped model returns.

    Attributes:
        exit_gate_logits: Of every iteration [iteration batch pos], None without an exit gate.
        iteration_logits: What the model would say if the loop ended there, [iteration batch pos vocab]
            or, at chosen places, [iteration place vocab]; None unless asked for.
    """

    exit_gate_logits: Tensor | None = None
    iteration_logits: Tensor | None = None


class LoopedPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the weights."""

    config: LoopedConfig
    config_class = LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearInjection):
            # 0.7 [I, I] keeps the scale of a sum of two equally large streams.
            eye = 0.7 * torch.eye(module.adapter.out_features)
            module.adapter.weight.copy_(torch.cat([eye, eye], dim=1))
        if isinstance(module, ScaledEmbedding) and self.config.tie_word_embeddings:
            std, limit = self.config.initializer_range, _tied_std(self.config)
            if std > limit:
                module.weight.mul_(limit / std)


def _tied_std(config: LoopedConfig) -> float:
    """The largest deviation of tied embeddings with which a new model does no worse than guessing.

    Where the stream still is the embedding, a token's own logit is d_model times the deviation, which makes
    the loss that much larger than the logarithm of the vocabulary: 3% at most.
    """
    n = config.vocab_size
    return math.log1p(n * (n**0.03 - 1)) / config.hidden_size


class LoopedModel(LoopedPreTrainedModel):
    """Embedding, prelude, loop, coda: everything below the final norm."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        d_model, first_core = config.hidden_size, config.prelude_layers
        first_coda = first_core + config.core_layers
        self.embed_tokens = ScaledEmbedding(
            config.vocab_size, d_model, config.pad_token_id, config.embedding_scale
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.prelude = nn.ModuleList(LoopedBlock(config, i) for i in range(first_core))
        self.core = nn.ModuleList(LoopedBlock(config, i) for i in range(first_core, first_coda))
        self.coda = nn.ModuleList(
            LoopedBlock(config, i) for i in range(first_coda, first_coda + config.coda_layers)
        )
        if config.injection == "linear":
            self.injection = LinearInjection(d_model)
        elif config.injection == "diagonal":
            self.injection = DiagonalInjection(d_model)
        elif config.injection == "add":
            self.injection = AddInjection()
        if config.prelude_norm:
            self.prelude_norm = LlamaRMSNorm(d_model, config.rms_norm_eps)
        if config.state_projection:
            self.state_projection = nn.Linear(d_model, d_model, bias=False)
        if config.exit_gate:
            self.exit_gate = nn.Linear(d_model, 1)
        self.norm = LlamaRMSNorm(d_model, config.rms_norm_eps)
        # The norms inside the loop are the final norm's weights in a module of their own: whoever
        # hooks the final norm sees it once. Not a submodule, so no second name in the state dict.
        self.__dict__["inner_norm"] = tied_clone(self.norm)
        self.initial_state: InitialState = 0
        self.site: Site = _no_site
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prelude_output: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_hidden_states: bool | None = None,
        backprop_iterations: int | None = None,
        read_iterations: bool | Collection[int] = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Cache | None, Tensor | None, tuple[Tensor, ...]]:
        """Run all blocks. See `LoopedTransformer.forward` for the arguments.

        Returns:
            The final normed stream [batch pos d_model], or that of every iteration
            [iteration batch pos d_model] that was asked for, the cache, the exit gate's logits
            [iteration batch pos], and every firing's output if asked for.
        """
        config, site = self.config, self.site
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if read_iterations and (past_key_values is not None or use_cache or self.site is not _no_site):
            raise ValueError(
                "read_iterations runs the coda once for all iterations, so it takes a bare model without a "
                "key-value cache: pass use_cache=False, and read an opened model with lens(kind='native')"
            )
        if backprop_iterations is not None and backprop_iterations < 1:
            raise ValueError(f"backprop_iterations must be at least 1, got {backprop_iterations}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        named_cache: dict[str, Any] = {CACHE_NAME: past_key_values}
        mask = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        shared: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "position_embeddings": self.rotary_emb(x, position_ids),
            **kwargs,
        }
        outputs: list[Tensor] = []

        def run(blocks: nn.ModuleList, stream: Tensor) -> Tensor:
            for block in blocks:
                stream = block(stream, **shared)
                if output_hidden_states:
                    outputs.append(stream)
            return stream

        e = run(self.prelude, x)
        if config.prelude_norm:
            e = self.prelude_norm(e)
        e = site("hook_prelude_out", e) if prelude_output is None else prelude_output
        gates: list[Tensor] = []
        if initial_state is None:
            cached = past_key_values is not None
            state = draw_initial_state(self.initial_state, config, e, position_ids, past, cached)
        else:
            state = initial_state
        # Hooks may write in place: the state must never be the tensor that is injected again.
        state = site("hook_initial_state", state.clone() if state is e else state)
        grad, states = torch.is_grad_enabled(), list[Tensor]()
        wanted = range(config.recurrences) if read_iterations is True else read_iterations or ()
        if any(not 0 <= t < config.recurrences for t in wanted):
            raise ValueError(
                f"iterations {list(wanted)} cannot all be read: there are 0-{config.recurrences - 1}"
            )
        first_grad = 0 if backprop_iterations is None else config.recurrences - backprop_iterations
        for t in range(config.recurrences):
            if t == first_grad > 0:
                # Some versions of torch keep casts made without a graph, which would cut the weights' gradients.
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(grad and t >= first_grad):
                state = site(f"loop.{t}.hook_state_in", state)
                if config.injection != "none":
                    state = site(f"loop.{t}.hook_injected", self.injection(state, _rows_of(e, len(state))))
                state = run(self.core, state)
                last = t == config.recurrences - 1
                if config.loop_norm:
                    # With no coda, the last iteration's norm is the final one.
                    final = last and not config.coda_layers
                    state = (self.norm if final else self.__dict__["inner_norm"])(state)
                state = site(f"loop.{t}.hook_state_out", state)
            if config.exit_gate:
                gate = self.exit_gate(state).squeeze(-1)
                gates.append(site(f"loop.{t}.hook_exit_gate", gate))
            if t in wanted:
                states.append(state)
        # Rows that joined later have no gates of earlier iterations.
        whole = all(gate.shape == state.shape[:-1] for gate in gates)
        if read_iterations:
            state = torch.cat(states)
            if mask is not None:
                shared["attention_mask"] = mask.repeat(len(states), *(1 for _ in mask.shape[1:]))
        if config.post_loop_norm:
            state = self.__dict__["inner_norm"](state)
        if config.state_projection:
            state = self.state_projection(state)
        state = run(self.coda, state)
        if not (config.loop_norm and not config.coda_layers):
            state = self.norm(state)
        if read_iterations:
            state = state.unflatten(0, (len(states), -1))
        return state, past_key_values, torch.stack(gates) if gates and whole else None, tuple(outputs)


class LoopedTransformer(LoopedPreTrainedModel, GenerationMixin):
    """A looped language model.

    ``model.initial_state`` and ``model.config.recurrences`` may change at any time. Two forwards of
    the same tokens are equal: noise is drawn from the seed in ``initial_state`` (0 by default), by
    position, so that batches, padding on the left and cached decoding do not change it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prelude_output: Tensor | None = None,
        initial_state: Tensor | None = None,
        cache: Cache | None = None,
        backprop_iterations: int | None = None,
        read_iterations: bool | Collection[int] = False,
        places: Tensor | None = None,
        **kwargs: Any,
    ) -> LoopedOutput:
        """Run the model.

        Args:
            input_ids: Tokens [batch pos].
            attention_mask: 1 for tokens, 0 for padding [batch pos].
            position_ids: Positions [batch pos].
            past_key_values: Cache of earlier positions; every firing has a slot of its own.
            inputs_embeds: Embeddings [batch pos d_model] instead of tokens.
            labels: Tokens to predict, for the next-token loss at full depth.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return every firing's output, in order.
            logits_to_keep: Read out this many last positions only; 0 for all.
            prelude_output: Injected instead of the prelude's own output [batch pos d_model].
            initial_state: State before iteration 0 [batch pos d_model], for this forward only.
            cache: Another name of ``past_key_values``, the one of transformers 5.24 and later.
            backprop_iterations: Keep a graph of this many last iterations only; earlier ones run without,
                so that neither their state nor what they inject gets gradients. None for all.
            read_iterations: Whether to return what the model would say after each iteration, or after these
                iterations (from 0, in order), from one forward; ``logits`` are then the last one's. Not with
                a key-value cache, nor on a model whose hooks are in use.
            places: Read out at these places only, as indices into the flattened [batch * pos]: logits
                are [place vocab].
            **kwargs: Passed on to the attention implementation.
        """
        kwargs.pop("output_attentions", None)
        kwargs.pop("return_dict", None)
        stream, cache, gates, firings = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prelude_output=prelude_output,
            initial_state=initial_state,
            output_hidden_states=output_hidden_states,
            backprop_iterations=backprop_iterations,
            read_iterations=read_iterations,
            **kwargs,
        )
        if places is not None:
            stream = stream.flatten(-3, -2).index_select(-2, places)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            stream = stream[..., keep, :]
        logits = self.lm_head(stream)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.upcast_logits:
            logits = logits.float()
        every = None
        if read_iterations:
            every, logits = logits, logits[-1]
        loss = None
        if labels is not None:
            compute: Any = self.loss_function
            loss = compute(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        fields: dict[str, Any] = {
            "loss": loss,
            "logits": logits,
            CACHE_NAME: cache,
            "hidden_states": firings if output_hidden_states else None,
            "exit_gate_logits": gates,
            "iteration_logits": every,
        }
        return LoopedOutput(**fields)


def _rows_of(e: Tensor, n: int) -> Tensor:
    """The prelude's output [batch pos d_model] for a batch that grew to n rows, all batches alike."""
    return e if len(e) == n else e.repeat(n // len(e), 1, 1)


def _no_site(name: str, value: Tensor) -> Tensor:
    return value
