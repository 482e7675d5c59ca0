"""HRM-Text (arXiv 2605.20613): transformers' own class, two stacks in nested loops.

    z_H = embedding; z_L = z_L_init
    for h: (for l: z_L = L(z_L + z_H)); z_H = H(z_H + z_L)

The modules and their forward stay transformers'; slots over the two stacks see the states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
    RotaryEmbeddingBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import HrmTextConfig, HrmTextForCausalLM

from loop_lens.models.checkpoint import Checkpoint
from loop_lens.models.kind import Kind, Unrolled, bridge_config
from loop_lens.unrolling.body import LoopBody
from loop_lens.unrolling.kv import past_length
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.slots import Slot, TrunkSlot, put_slot, take_slot
from loop_lens.unrolling.tree import Blocks, Loop, Segments

_SITES = ("hook_state_in", "hook_injected", "hook_state_out")


def hrm_schedule(n_layers: int, h_cycles: int, l_cycles: int) -> Schedule:
    """Firings of HRM-Text: ``L`` iterations inside ``H`` iterations, then the ``H`` stack."""
    low = Loop("L", l_cycles, Blocks("L", n_layers), sites=_SITES)
    high = Loop("H", h_cycles, low, Blocks("H", n_layers), sites=_SITES)
    return Schedule(Segments(high, sites=("hook_prelude_out", "hook_initial_state")))


class HrmBody(LoopBody):
    """Unrolls a ``HrmTextForCausalLM``. Gradients reach every iteration, unlike in training there."""

    block_path = "model.layers"
    non_additive_because = "each stack ends in a norm, and two states are added before every stack"
    fold_unsound_because = "the norms of HRM-Text have no weights to fold"

    def __init__(self, model: HrmTextForCausalLM) -> None:
        trunk = model.model
        self.outer, self.model = model, trunk
        config: Any = model.config
        self.config = config
        n_layers = config.num_layers_per_stack
        schedule = hrm_schedule(n_layers, config.H_cycles, config.L_cycles)
        blocks = [*trunk.L_module.layers, *trunk.H_module.layers]
        super().__init__(trunk, blocks, schedule, cache_slots=False)

    def install(self) -> None:
        """Put slots over blocks, stacks and trunk."""
        super().install()
        put_slot(self.model.L_module, StackSlot, self, 0)
        put_slot(self.model.H_module, StackSlot, self, 1)
        put_slot(self.model.H_module.final_norm, FinalNormSlot, self, 0)
        take_slot(self.model)
        put_slot(self.model, HrmTrunkSlot, self, 0)
        put_slot(self.outer, ConfigSlot, self, 0)

    def remove(self) -> None:
        """Take the slots away again."""
        super().remove()
        take_slot(self.model.L_module)
        take_slot(self.model.H_module)
        take_slot(self.model.H_module.final_norm)
        take_slot(self.outer)

    @property
    def base(self) -> Schedule:
        """What the config says."""
        loops, config = self._base.loops, self.config
        if (loops["H"].times, loops["L"].times) != (config.H_cycles, config.L_cycles):
            self._base = self._base.with_times(H=config.H_cycles, L=config.L_cycles)
        return self._base

    @base.setter
    def base(self, schedule: Schedule) -> None:
        vars(self.config).update(self._fields(schedule))  # all at once: an interrupt leaves no mixture

    def _fields(self, schedule: Schedule) -> dict[str, int]:
        h, low = schedule.loops["H"].times, schedule.loops["L"].times
        n_layers = self.config.num_layers_per_stack * h * (low + 1)
        return {"H_cycles": h, "L_cycles": low, "num_hidden_layers": n_layers}

    @property
    def config_fields(self) -> dict[str, Any]:
        """The numbers of iterations in force."""
        return dict(self._fields(self.schedule))

    @property
    def executed(self) -> Schedule:
        """What the forward under way runs, or one that would begin here."""
        return (self.plan if self.run is None else self.run.plan).executed

    def config_of_run(self) -> Any:
        """The model's config with the numbers of iterations of the forward under way."""
        config, fields = self.config, self._fields(self.executed)
        if (fields["H_cycles"], fields["L_cycles"]) != (config.H_cycles, config.L_cycles):
            config = copy.copy(config)
        vars(config).update(fields)
        return config

    def require_resumable(self, start: int, prelude_out: Tensor | None) -> dict[str, Any]:
        """Two states cannot be resumed from one residual."""
        raise ValueError(
            "start_at_layer does not work on HRM-Text: a block's input is the sum of two states, and the "
            "rest of the forward needs each of them. Patch H.{h}.hook_state_in or H.{h}.L.{l}.hook_state_in."
        )

    @property
    def keeps_prefix(self) -> bool:
        """The model is causal, and numbers the keys and values of its firings."""
        return True

    def injection(self, state: Tensor, injected: Tensor, prelude_out: Tensor) -> Tensor:
        """The other stack's state, which is added."""
        return injected - state

    @property
    def ends_normed(self) -> bool:
        """Each stack ends in a norm."""
        return True

    @property
    def reads_iterations(self) -> bool:
        """The high-level state is what the model reads out."""
        return True

    def begin(self, embedding: Tensor) -> None:
        """Note the states before the first iteration."""
        run = self.run
        if run is not None:
            low = self.model.z_L_init.to(embedding.dtype).expand_as(embedding)
            scale: Any = self.model.embedding_scale
            run.notes.update(stacks=0, H=embedding * scale, L=low, stale=False)

    def stack(self, high: bool, bare: Callable[..., Tensor], mixed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Run one stack for one iteration.

        The sum ``mixed`` is the model's own unless a state was looked at: a hook may have replaced
        it, so the sum is formed again, from copies, since hooks may write in place.
        """
        run = self.run
        if run is None or "stacks" not in run.notes:
            return bare(mixed, **kwargs)
        notes = run.notes
        loops = run.plan.executed.loops
        h, low = divmod(notes["stacks"], loops["L"].times + 1)
        notes["stacks"] += 1
        prefix = f"H.{h}" if high else f"H.{h}.L.{low}"
        if not high:
            seen = [("L", f"{prefix}.hook_state_in")]
            if low == 0:
                seen.insert(0, ("H", f"H.{h}.hook_state_in"))
                if h == 0:
                    seen = [("H", "hook_prelude_out"), ("L", "hook_initial_state"), *seen]
            for state, site in seen:
                if self.wants(site):
                    notes[state] = self.site(site, notes[state])
                    notes["stale"] = True
        if notes["stale"]:
            mixed = notes["L"] + notes["H"]
        mixed = self.site(f"{prefix}.hook_injected", mixed)
        notes["last"] = high and h == loops["H"].times - 1
        out = self.site(f"{prefix}.hook_state_out", bare(mixed, **kwargs))
        notes["H" if high else "L"] = out
        # From here on the model's own variables are current, except z_H until its stack has run.
        notes["stale"] = notes["stale"] and not high
        return out


class StackSlot(TrunkSlot):
    """One of the two stacks."""

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        bare = super(TrunkSlot, self).__call__
        body = self._unroller
        assert isinstance(body, HrmBody)
        return body.stack(bool(self._slot), bare, hidden_states, kwargs)


class FinalNormSlot(TrunkSlot):
    """The high-level stack's norm under transformer-lens' bridge: hooked in its last run alone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = self._unroller
        assert isinstance(body, HrmBody)
        run = body.run
        bare = self._modules.get("_original_component")
        if run is None or bare is None or run.notes.get("last", True):
            return super(TrunkSlot, self).__call__(*args, **kwargs)
        return bare(*args, **kwargs)


class ConfigSlot(Slot):
    """A module that asks its config how often its loops run: each forward is told its own numbers."""

    @property
    def config(self) -> Any:
        """The config, with the numbers of iterations of the forward under way."""
        body = self._unroller
        assert isinstance(body, HrmBody)
        return body.config_of_run()

    @property
    def L_bp_cycles_padded(self) -> list[int]:
        """In how many low-level iterations gradients are kept: in all of them."""
        body = self._unroller
        assert isinstance(body, HrmBody)
        loops = body.executed.loops
        return [loops["L"].times] * loops["H"].times


class HrmTrunkSlot(ConfigSlot, TrunkSlot):
    """The model below the head: embeds tokens itself, so that the first state is known."""

    def __call__(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        body = self._unroller
        assert isinstance(body, HrmBody)
        embedding: Tensor = body.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        with body.forward(past_length((), kwargs)) as run:
            body.begin(embedding)
            out = super(TrunkSlot, self).__call__(inputs_embeds=embedding, **kwargs)
            body.require_complete(run)
            return out


class HrmTextLoopedAdapter(ArchitectureAdapter):
    """Reads transformers' HRM-Text with both stacks in one list of blocks."""

    supports_hf_output_attentions = False
    supports_fold_ln = False

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions = {**self._qkvo_weight_conversions()}
        parts: dict[str, GeneralizedComponent] = {p: LinearBridge(name=f"{p}_proj") for p in "qkvo"}
        parts["gate"] = LinearBridge(name="gate_proj")
        submodules: dict[str, GeneralizedComponent] = {
            "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
            "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
            "attn": PositionEmbeddingsAttentionBridge(name="self_attn", config=self.cfg, submodules=parts),
            "mlp": self._gated_mlp(),
        }
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": RotaryEmbeddingBridge(name="model.rotary_emb", config=self.cfg),
            "blocks": BlockBridge(name="model.layers", submodules=submodules),
            # The high-level stack ends in it; only its last run is the model's final norm.
            "ln_final": RMSNormalizationBridge(name="model.H_module.final_norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }


class HrmKind(Kind):
    """transformers' HRM-Text."""

    model_types = (HrmTextConfig.model_type,)
    classes = (HrmTextConfig, HrmTextForCausalLM)

    def load(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None, attn_implementation: str | None
    ) -> HrmTextForCausalLM:
        """The model as transformers loads it."""
        return checkpoint.open_with(HrmTextForCausalLM, dtype=dtype, attn_implementation=attn_implementation)

    def unroll(self, model: HrmTextForCausalLM, *, name: str, tokenizer: Any) -> Unrolled:
        """The model with its `HrmBody`."""
        return Unrolled(model, HrmBody(model), HrmTextLoopedAdapter(bridge_config(model, name)))


HRM_TEXT = HrmKind()
