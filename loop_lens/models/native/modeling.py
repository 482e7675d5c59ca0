"""The native looped decoder: one configurable model for Huginn, Ouro, the retrofits and Parcae."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loop_lens.models.native.config import LoopedConfig
from loop_lens.models.native.layers import (
    AddInjection,
    DiagonalInjection,
    LinearInjection,
    LoopedBlock,
    LoopedRMSNorm,
    ScaledEmbedding,
)
from loop_lens.models.native.passes import Pass
from loop_lens.models.native.state import InitialState, draw_initial_state, require_initial_state
from loop_lens.unrolling.clones import tied_clone
from loop_lens.unrolling.keywords import keywords_of, require_keywords
from loop_lens.unrolling.kv import CACHE_NAME
from loop_lens.unrolling.numbers import whole

Site = Callable[[str, Tensor], Tensor]
# What transformers' own methods and tokenizers hand to every model.
_UNUSED = ("cache_position", "output_attentions", "return_dict", "token_type_ids")


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
            self.prelude_norm = LoopedRMSNorm(d_model, config.rms_norm_eps)
        if config.state_projection:
            self.state_projection = nn.Linear(d_model, d_model, bias=False)
        if config.exit_gate:
            self.exit_gate = nn.Linear(d_model, 1)
        self.norm = LoopedRMSNorm(d_model, config.rms_norm_eps)
        # In a tuple it is no submodule, so its weights have no second name in the state dict.
        self._unregistered = (tied_clone(self.norm),)
        self._given_state: Tensor | None = None
        self.site: Site = _no_site
        self.times: Callable[[], int] | None = None
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def initial_state(self) -> InitialState:
        """What the state before the first iteration is made from; seeds and ``"zeros"`` are the config's."""
        return self.config.initial_state_seed if self._given_state is None else self._given_state

    @initial_state.setter
    def initial_state(self, value: Any) -> None:
        value = require_initial_state(value, self.config.hidden_size)
        self._given_state = value if isinstance(value, Tensor) else None
        if not isinstance(value, Tensor):
            self.config.initial_state_seed = value

    @property
    def inner_norm(self) -> LoopedRMSNorm:
        """The final norm's weights in a module of their own: whoever hooks the final norm sees it once."""
        return self._unregistered[0]

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
        recurrences: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Cache | None, Tensor | None, tuple[Tensor, ...]]:
        """Run all blocks. See `LoopedTransformer.forward` for the arguments.

        Returns:
            The final normed stream [batch pos d_model], or that of every iteration
            [iteration batch pos d_model] that was asked for, the cache, the exit gate's logits
            [iteration batch pos], and every firing's output if asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        times = self._number_of_iterations(recurrences)
        read = self._iterations_to_read(
            read_iterations, times, past_key_values is not None or bool(use_cache)
        )
        if backprop_iterations is not None and backprop_iterations < 1:
            raise ValueError(f"backprop_iterations must be at least 1, got {backprop_iterations}")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()

        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        run = self._begin(x, attention_mask, position_ids, past_key_values, kwargs)
        run.times, run.outputs = times, [] if output_hidden_states else None
        e = self._prelude_output(x, run)
        e = self.site("hook_prelude_out", e) if prelude_output is None else prelude_output
        state = self._first_state(e, run) if initial_state is None else initial_state
        # Hooks may write in place: the state must never be the tensor that is injected again.
        state = self.site("hook_initial_state", state.clone() if state is e else state)
        states, gates = self._loop(state, e, run, read, backprop_iterations)
        stream = self._read_out(states, run)

        if read_iterations:
            stream = stream.unflatten(0, (len(states), -1))
        # Rows that joined the batch later have no gates of earlier iterations.
        whole = len({gate.shape for gate in gates}) == 1
        return stream, past_key_values, torch.stack(gates) if whole else None, tuple(run.outputs or ())

    def _number_of_iterations(self, asked: int | None) -> int:
        """As asked for; else as whoever unrolls this model says; else the config's."""
        if self.times is None:
            return self.config.recurrences if asked is None else whole(asked, "recurrences", 1)
        times = self.times()
        if asked is not None and asked != times:
            raise ValueError(
                f"recurrences={asked}, but this model is open and runs {times}: give the number to what opened it, "
                "the HookedLoopedTransformer"
            )
        return times

    def _iterations_to_read(self, asked: bool | Collection[int], times: int, cached: bool) -> Collection[int]:
        """The iterations after which the coda reads the state: the last one, unless others are asked for."""
        if not asked:
            return (times - 1,)
        if cached or self.site is not _no_site:
            raise ValueError(
                "read_iterations runs the coda once for all iterations, so it takes a bare model without a "
                "key-value cache: pass use_cache=False, and read an opened model with lens(kind='native')"
            )
        read = range(times) if asked is True else asked
        if any(not 0 <= t < times for t in read):
            raise ValueError(f"iterations {list(read)} cannot all be read: there are 0-{times - 1}")
        return read

    def _begin(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        kwargs: dict[str, Any],
    ) -> Pass:
        """What the blocks share in a forward of the embedding x [batch pos d_model]."""
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        named_cache: dict[str, Any] = {CACHE_NAME: cache}
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        shared: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "position_embeddings": self.rotary_emb(x, position_ids),
            **kwargs,
        }
        return Pass(shared, past, self.config.recurrences, None)

    def _prelude_output(self, x: Tensor, run: Pass) -> Tensor:
        e = run.through(self.prelude, x)
        return self.prelude_norm(e) if self.config.prelude_norm else e

    def _first_state(self, e: Tensor, run: Pass) -> Tensor:
        cached = run.shared["past_key_values"] is not None
        return draw_initial_state(
            self.initial_state, self.config, e, run.shared["position_ids"], run.past, cached
        )

    def _loop(
        self, state: Tensor, e: Tensor, run: Pass, read: Collection[int], backprop_iterations: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run all iterations. Returns the states after the iterations to read, and every iteration's gates."""
        times, grad = run.times, torch.is_grad_enabled()
        first_grad = 0 if backprop_iterations is None else times - backprop_iterations
        states, gates = list[Tensor](), list[Tensor]()
        for t in range(times):
            if t == first_grad > 0:
                # Some versions of torch keep casts made without a graph, which would cut the weights' gradients.
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(grad and t >= first_grad):
                state = self._iterate(t, state, e, run)
            if self.config.exit_gate:
                gates.append(self.site(f"loop.{t}.hook_exit_gate", self.exit_gate(state).squeeze(-1)))
            if t in read:
                states.append(state)
        return states, gates

    def _iterate(self, t: int, state: Tensor, e: Tensor, run: Pass) -> Tensor:
        config, site = self.config, self.site
        state = site(f"loop.{t}.hook_state_in", state)
        if config.injection != "none":
            state = site(f"loop.{t}.hook_injected", self.injection(state, _rows_of(e, len(state))))
        # Behind the first slots of all blocks.
        slots = config.num_hidden_layers + (t - 1) * config.core_layers if t else None
        state = run.through(self.core, state, slots)
        if config.loop_norm:
            # With no coda, the last iteration's norm is the final one.
            final = t == run.times - 1 and not config.coda_layers
            state = (self.norm if final else self.inner_norm)(state)
        return site(f"loop.{t}.hook_state_out", state)

    def _read_out(self, states: list[Tensor], run: Pass) -> Tensor:
        """The final normed stream [state * batch pos d_model] after the coda, of all states in one batch."""
        config, mask = self.config, run.shared["attention_mask"]
        state = states[0] if len(states) == 1 else torch.cat(states)
        if mask is not None and len(states) > 1:
            run.shared["attention_mask"] = mask.repeat(len(states), *(1 for _ in mask.shape[1:]))
        if config.post_loop_norm:
            state = self.inner_norm(state)
        if config.state_projection:
            state = self.state_projection(state)
        state = run.through(self.coda, state)
        return state if config.loop_norm and not config.coda_layers else self.norm(state)


class LoopedTransformer(LoopedPreTrainedModel, GenerationMixin):
    """A looped language model.

    ``model.model.initial_state`` and ``model.config.recurrences`` may change at any time. Two forwards of
    the same tokens are equal: noise is drawn from the seed in ``initial_state`` (0 by default), by
    position, so that batches, padding on the left and cached decoding do not change it.

    Example:
        >>> bare = loop_lens.LoopedTransformer(loop_lens.LoopedConfig(vocab_size=10, recurrences=3))
        >>> bare(torch.arange(5)[None], read_iterations=True).iteration_logits.shape
        torch.Size([3, 1, 5, 10])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def forward_keywords(self) -> frozenset[str]:
        """The keywords that a forward reads."""
        named = keywords_of(LoopedTransformer.forward) | keywords_of(LoopedModel.forward)
        return named | FlashAttentionKwargs.__optional_keys__ | {"is_causal", "num_items_in_batch", *_UNUSED}

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
        cache: Cache | None = None,
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
            use_cache: Whether to make a cache and return it; without being asked, only generation does.
            output_hidden_states: Whether to return every firing's output, in order.
            logits_to_keep: Read out this many last positions only; 0 for all.
            cache: Another name of ``past_key_values``, the one of transformers 5.24 and later.
            read_iterations: Whether to return what the model would say after each iteration, or after these
                iterations (from 0, in order), from one forward; ``logits`` are then the last one's. Not with
                a key-value cache, nor on a model whose hooks are in use.
            places: Read out at these places only, as indices into the flattened [batch * pos]: logits
                are [place vocab].
            **kwargs: ``recurrences``: number of iterations, for this forward only; ``prelude_output``, injected
                instead of the prelude's own output [batch pos d_model]; ``initial_state``, before
                iteration 0 [batch pos d_model], for this forward only; ``backprop_iterations``: keep a
                graph of this many last iterations only, earlier ones run without, so that neither their
                state nor what they inject gets gradients; and what the attention implementation takes.

        Raises:
            TypeError: If a keyword is none that is read.
        """
        require_keywords(kwargs, self.forward_keywords, "LoopedTransformer()")
        n_items = kwargs.pop("num_items_in_batch", None)
        for unused in _UNUSED:
            kwargs.pop(unused, None)
        stream, cache, gates, firings = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
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
            loss = compute(logits, labels, self.config.vocab_size, num_items_in_batch=n_items)
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
