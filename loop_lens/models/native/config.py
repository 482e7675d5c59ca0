"""Configuration of the native looped decoder."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from numbers import Real
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from loop_lens.unrolling.keywords import DEPTHS, require_keywords
from loop_lens.unrolling.numbers import whole
from loop_lens.unrolling.schedule import Schedule
from loop_lens.unrolling.tree import Blocks, Loop, Segments

BLOCK_NORMS = ("pre", "sandwich", "post_branch", "post_residual")
INJECTIONS = ("none", "add", "linear", "diagonal")
INITIAL_STATES = ("prelude", "zeros", "noise")
QK_NORMS = ("none", "full", "head", "head_after_rope")

_SIZES = (
    *("recurrences", "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_ON_TOP = """
    _attn_implementation _attn_implementation_internal _commit_hash _experts_implementation_internal _name_or_path
    attn_implementation auto_map experts_implementation model_type name_or_path num_labels output_attentions
    partial_rotary_factor per_layer_config quantization_config rope_scaling rope_theta torch_dtype
"""
_KNOWN_TO_TRANSFORMERS = frozenset(GenerationConfig().to_dict()) | set(_ON_TOP.split())
"""Beyond its fields: what transformers' own constructor reads, writes into files, or once did."""


def _read(name: str, kind: str, value: Any) -> Any:
    """A field's value as Python's own type, numbers of numpy and tensors too.

    Raises:
        TypeError: If it is of another type.
        ValueError: If it is no whole number, or no size, where one belongs.
    """
    wanted = kind.removesuffix(" | None")
    if wanted not in ("int", "float", "bool", "str") or (value is None and wanted != kind):
        return value
    if wanted == "int":
        return whole(value, name, 1 if name in _SIZES else None)
    if wanted == "float" and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if wanted != "float" and isinstance(value, {"bool": bool, "str": str}[wanted]):
        return value
    raise TypeError(f"{name} must be a {wanted}, got {value!r}")


class LoopedConfig(PreTrainedConfig):
    """One looped decoder: prelude, a core that runs ``recurrences`` times, coda.

    Published families are mappings onto these fields (`loop_lens.models.published`); the defaults are a
    small model that trains well.

    Example:
        >>> config = loop_lens.LoopedConfig(hidden_size=32, core_layers=3, recurrences=8)
        >>> print(config.schedule())
        prelude  1 block             firing  0
        loop     8 x 3 blocks        firings 1-24
        coda     1 block             firing  25

    Attributes:
        vocab_size: Number of tokens.
        hidden_size: Width of the residual stream, d_model.
        intermediate_size: Width of the MLP, d_mlp.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; None for as many as query heads.
        head_dim: Width of a head; None for hidden_size / num_attention_heads.
        hidden_act: Activation of the MLP, a name known to transformers.
        gated_mlp: Whether the MLP multiplies its activation with a second projection (SwiGLU).
        prelude_layers: Blocks before the loop.
        core_layers: Blocks inside the loop.
        coda_layers: Blocks after the loop.
        recurrences: Number of iterations.
        block_norm: ``"pre"``: x += A(n x); ``"sandwich"``: x += n'(A(n x)); ``"post_branch"``:
            x += n(A x); ``"post_residual"``: x = n'(x + A(n x)).
        qk_norm: RMS norm of queries and keys: ``"none"``, over the ``"full"`` vector before the
            heads are split (OLMo-2), per ``"head"`` before RoPE, or weightless
            ``"head_after_rope"`` (Parcae).
        injection: What brings the prelude's output e into iteration t: ``"none"``, ``"add"``:
            s + e, ``"linear"``: W [s; e], ``"diagonal"``: exp(-dt A) s + dt B e.
        initial_state: State before the first iteration: the ``"prelude"``'s output, ``"zeros"``,
            or ``"noise"`` from a normal distribution cut at three standard deviations.
        initial_state_std: Its standard deviation.
        initial_state_seed: The noise's seed, or ``"zeros"`` for zeros in its stead.
        prelude_norm: Whether the prelude's output is normed.
        loop_norm: Whether the state is normed after every iteration (by the final norm's weights).
        post_loop_norm: Whether the state is normed once, after the last iteration (likewise).
        state_projection: Whether a matrix maps the last state to the coda (Parcae's C).
        exit_gate: Whether a linear gate reads every iteration's state (Ouro).
        embedding_scale: Factor on the token embedding.
        logit_scale: Factor on the logits.
        qk_bias: Whether queries and keys have a bias.
        attention_bias: Whether all attention projections have one.
        mlp_bias: Whether the MLP's projections have one.
        upcast_logits: Whether logits are float32 whatever the dtype of the weights.
        initializer_range: Standard deviation of new weights; tied embeddings may get a smaller one, so
            that a new model does no worse than guessing.
        family: Name of the published family that the weights come from, if any.
        published: That family's own config fields, to write its format again.
    """

    model_type = "loop_lens"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 512
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    prelude_layers: int = 1
    core_layers: int = 2
    coda_layers: int = 1
    recurrences: int = 4
    block_norm: str = "pre"
    qk_norm: str = "none"
    injection: str = "linear"
    initial_state: str = "noise"
    initial_state_std: float = 0.3
    initial_state_seed: int | str = 0
    prelude_norm: bool = False
    loop_norm: bool = False
    post_loop_norm: bool = False
    state_projection: bool = False
    exit_gate: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    qk_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    upcast_logits: bool = False
    attention_dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    family: str | None = None
    published: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        names = {each.name for each in fields(self) if not each.name.startswith("_")}
        saved = "model_type" in kwargs  # a config.json may hold what another version of transformers knows
        given = [
            n for n in kwargs if not saved or n in DEPTHS or get_close_matches(n, names, n=1, cutoff=0.8)
        ]
        require_keywords(given, names | _KNOWN_TO_TRANSFORMERS, "LoopedConfig()")
        for each in fields(self):
            if each.name in LoopedConfig.__annotations__:
                setattr(self, each.name, _read(each.name, str(each.type), getattr(self, each.name)))
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads: "
                    "change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta", 10000.0)}
        super().__post_init__(**kwargs)
        self._require_sound()

    def _require_sound(self) -> None:
        for name, allowed in (
            ("block_norm", BLOCK_NORMS),
            ("injection", INJECTIONS),
            ("initial_state", INITIAL_STATES),
            ("qk_norm", QK_NORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {allowed}")
        if self.initial_state_seed != "zeros":
            self.initial_state_seed = whole(
                self.initial_state_seed, "initial_state_seed is 'zeros' or a seed, which"
            )
        if self.core_layers < 1 or self.prelude_layers < 0 or self.coda_layers < 0:
            raise ValueError(
                "a looped model needs at least one core layer and no negative sizes, got prelude "
                f"{self.prelude_layers}, core {self.core_layers}, coda {self.coda_layers}"
            )
        if self.injection != "none" and self.initial_state == "prelude" and not self.prelude_layers:
            raise ValueError(
                f"the {self.injection} injection has no prelude's output to inject: the loop starts from the "
                "embedding itself, so give prelude_layers of at least 1, another initial_state, or injection='none'"
            )
        if self.num_key_value_heads is None or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value "
                "heads: the second must divide the first"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Number of physical blocks."""
        return self.prelude_layers + self.core_layers + self.coda_layers

    @property
    def additive(self) -> bool:
        """Whether the stream before the final norm is the sum of the embedding and all branches."""
        return self.non_additive_because is None

    @property
    def non_additive_because(self) -> str | None:
        """Why the stream is not one sum of component outputs, None where it is."""
        if self.block_norm == "post_residual":
            return "every block norms the residual stream itself"
        if self.loop_norm:
            return "a norm rescales the stream after every iteration"
        if self.post_loop_norm or self.prelude_norm or self.state_projection:
            return "the stream is rescaled between the loop and its neighbours"
        if self.injection != "none":
            return f"the {self.injection} injection mixes the prelude's output into every iteration"
        if self.initial_state != "prelude":
            return "the loop does not start from the prelude's output"
        return None

    def schedule(self) -> Schedule:
        """The firings of one forward."""
        loop_sites = ["hook_state_in", "hook_state_out"]
        if self.injection != "none":
            loop_sites.insert(1, "hook_injected")
        if self.exit_gate:
            loop_sites.append("hook_exit_gate")
        return Schedule(
            Segments(
                Blocks("prelude", self.prelude_layers),
                Loop("loop", self.recurrences, Blocks("core", self.core_layers), sites=loop_sites),
                Blocks("coda", self.coda_layers),
                sites=("hook_prelude_out", "hook_initial_state"),
            )
        )
