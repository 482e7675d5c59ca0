"""Whatever is done to a model's own modules, before or after it is opened: looking at it changes nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import loop_lens
from tests.conftest import GOLDENS
from tests.oracles.twin import small_looped
from tests.oracles.unrolled import decoder

TOKENS = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(1, 40, (2, 6), generator=torch.Generator().manual_seed(2))
BLOCKS = ("LoopedBlock", "GPT2Block", "LlamaDecoderLayer", "FalconDecoderLayer", "HrmTextDecoderLayer")


def falcon() -> Any:
    """A tiny Falcon, whose decoder layers have a ``forward`` of their own once they are opened."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    model = hf.FalconForCausalLM(hf.FalconConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.1) * torch.randn_like(parameter))
    return model


MAKE: dict[str, Callable[[], Any]] = {
    "native": small_looped,
    "gpt2": lambda: decoder("gpt2"),
    "llama": lambda: decoder("llama"),
    "falcon": falcon,
    "hrm": lambda: hf.HrmTextForCausalLM.from_pretrained(GOLDENS / "hrm_text"),
}


def make(kind: str) -> Any:
    """A bare model, the same each time."""
    torch.manual_seed(0)
    return MAKE[kind]()


def open_(model: Any) -> Any:
    """The model, opened; ordinary decoders with a window that loops."""
    if isinstance(model, loop_lens.LoopedTransformer | hf.HrmTextForCausalLM):
        return loop_lens.wrap(model)
    return loop_lens.loopify(model, layers=range(1, 3), times=2)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The physical blocks."""
    return [module for module in model.modules() if type(module).__name__ in BLOCKS]


def parts(model: nn.Module, *ends: str) -> Iterator[tuple[nn.Module, str, Any]]:
    """Parent, name and module of what is within the blocks and has such a class, or just this name."""
    for block in blocks_of(model):
        for path, module in list(block.named_modules()):
            parent, _, name = path.rpartition(".")
            if path and (type(module).__name__.endswith(ends) or name in ends):
                yield block.get_submodule(parent), name, module


LINEAR = ("Linear", "Conv1D")
ATTENTION = ("self_attn", "attn", "self_attention")


def lora(model: Any) -> None:
    """Attach adapters to every projection."""
    torch.manual_seed(3)
    names = sorted({name for _, name, _ in parts(model, *LINEAR)})
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, r=2)
    peft.inject_adapter_in_model(config, model)
    model.eval()


def pruned(model: Any) -> None:
    """Prune half of every projection."""
    for _, _, module in parts(model, *LINEAR):
        prune.l1_unstructured(module, "weight", 0.5)


class Shrunk(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """A smaller weight."""
        return 0.7 * weight


def parametrized(model: Any) -> None:
    """Parametrize every projection."""
    for _, _, module in parts(model, *LINEAR):
        parametrize.register_parametrization(module, "weight", Shrunk())


def quantized(model: Any) -> None:
    """Quantize what torch can."""
    for block in blocks_of(model):
        torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, inplace=True)  # pyright: ignore[reportDeprecated]


def doubled(model: Any) -> None:
    """Move to float64."""
    model.double()


def placed(model: Any) -> None:
    """Let accelerate move inputs to where each module is."""
    for block in blocks_of(model):
        for module in block.modules():
            add_hook_to_module(module, AlignDevicesHook("cpu"))


class Scaled(ModelHook):
    """A hook of accelerate's that changes what a module returns."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """A smaller output."""
        return shrink(output)


def shrink(output: Any) -> Any:
    """A smaller stream, whatever else is returned."""
    return (0.8 * output[0], *output[1:]) if isinstance(output, tuple) else 0.8 * output


def wrapped(model: Any) -> None:
    """Put accelerate's wrapper around branches and projections."""
    for _, _, module in parts(model, *LINEAR, *ATTENTION, "mlp"):
        add_hook_to_module(module, Scaled())


def hooked(model: Any) -> None:
    """Put torch hooks that change values on all modules within blocks, and on blocks."""
    for block in blocks_of(model):
        for module in block.modules():
            if isinstance(module, nn.Dropout | nn.Identity):
                continue
            module.register_forward_hook(lambda m, args, out: shrink(out))
            module.register_forward_pre_hook(
                lambda m, args, kwargs: ((1.1 * args[0], *args[1:]), kwargs) if args else None,
                with_kwargs=True,
            )


def unhooked(model: Any) -> None:
    """Put torch hooks there and take them away."""
    for block in blocks_of(model):
        for module in block.modules():
            module.register_forward_hook(lambda m, args, out: shrink(out)).remove()


def replaced(model: Any) -> None:
    """Replace every projection by a new one."""
    torch.manual_seed(5)
    for parent, name, module in parts(model, *LINEAR):
        new = type(module)(*reversed(module.weight.shape))  # what both take first is the weight's second size
        nn.init.normal_(new.weight, std=0.1)
        setattr(parent, name, new)


def norm_values(model: Any) -> None:
    """Set a number on every norm."""
    for _, _, module in parts(model, "Norm"):
        for key in ("eps", "variance_epsilon"):
            if hasattr(module, key):
                setattr(module, key, 0.5)


def own_forward(model: Any) -> None:
    """Put a function around every branch's forward."""
    for _, _, module in parts(model, *ATTENTION, "mlp"):

        def smaller(*args: Any, inner: Any = module.forward, **kwargs: Any) -> Any:
            return shrink(inner(*args, **kwargs))

        module.forward = smaller


def bound_forward(model: Any) -> None:
    """Bind another forward to every MLP, which calls the modules within."""

    def twice(self: Any, x: Tensor) -> Tensor:
        return 2 * type(self).forward(self, x)

    for _, _, module in parts(model, "mlp"):
        module.forward = twice.__get__(module)


CHANGES: dict[str, Callable[[Any], None]] = {
    change.__name__: change
    for change in (
        lora,
        pruned,
        parametrized,
        quantized,
        doubled,
        placed,
        wrapped,
        hooked,
        unhooked,
        replaced,
        norm_values,
        own_forward,
        bound_forward,
    )
}
SAME = ("doubled", "placed", "unhooked")
"""Changes after which the model says what it said."""


def mean_square(logits: Tensor) -> Tensor:
    """A metric."""
    return logits.square().mean()


@torch.no_grad()
def looks_like_bare(model: Any, names: int, exact: bool) -> Tensor:
    """Assert that no way of looking changes the logits, which are returned, or loses a name."""
    close = torch.equal if exact else functools.partial(torch.allclose, atol=1e-5, rtol=1e-5)
    bare, seen = model(TOKENS), []
    hooks = [(lambda name: True, lambda value, hook: seen.append(hook.name))]
    assert close(model.run_with_hooks(TOKENS, fwd_hooks=hooks), bare)
    logits, cache = model.run_with_cache(TOKENS)
    assert close(logits, bare) and len(cache) == names
    swept = loop_lens.patch_sweep(model, TOKENS, TOKENS, mean_square, site="attn_out", over="iteration")
    assert torch.allclose(swept.values.double(), mean_square(bare).double(), rtol=1e-4)
    return bare


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MAKE)
def test_looking_changes_nothing(kind: str, change: str, when: str) -> None:
    untouched = open_(make(kind))
    with torch.no_grad():
        expected, cache = untouched.run_with_cache(TOKENS)
    bare = make(kind)
    if when == "before":
        CHANGES[change](bare)
    model = open_(bare)
    if when == "after":
        model.run_with_cache(TOKENS)
        CHANGES[change](model.original_model)
    logits = looks_like_bare(model, len(cache), exact=kind == "native")
    moves = change not in SAME and (change != "quantized" or kind not in ("gpt2", "falcon"))
    assert torch.allclose(logits.to(expected.dtype), expected, atol=1e-5) is not moves
    if kind in ("native", "hrm"):
        oracle = make(kind)
        CHANGES[change](oracle)
        assert torch.allclose(logits, oracle(TOKENS).logits, atol=1e-6)


@pytest.fixture(params=["native", "llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return open_(make(request.param))


def last(model: Any) -> int:
    """Index of a firing in the loop's last iteration."""
    return max(firing.index for firing in model.schedule if firing.segment == "loop")


@torch.no_grad()
def test_hooks_and_bridges_stay_when_modules_are_put_in(model: Any) -> None:
    index = last(model)
    attn, seen = model.blocks[index].attn, []
    model.add_hook(f"blocks.{index}.attn.hook_z", lambda value, hook: seen.append(hook.name))
    attn.o.register_forward_hook(lambda m, args, out: seen.append("bridge"))
    inner = attn.o.original_component
    inner.register_forward_hook(lambda m, args, out: seen.append("clone"))
    model(TOKENS)
    expected = list(seen)
    assert len(expected) == 3
    lora(model.original_model)
    seen.clear()
    bare, hooked = model.original_model(TOKENS).logits, model(TOKENS)
    assert seen == expected * 2 and torch.equal(
        bare, hooked
    )  # the torch model's own forward shows the same firings
    assert model.blocks[index].attn is attn and attn.o.original_component is not inner
    model.reset_hooks()
    seen.clear()
    model(TOKENS)
    assert seen == ["clone", "bridge"]


@torch.no_grad()
def test_torch_hooks_on_the_models_own_modules_run_once_a_firing_whoever_looks(model: Any) -> None:
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def seen(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return seen

    for name, module in model.body.blocks[1].named_modules():
        if not isinstance(
            module, nn.Dropout
        ):  # does nothing here, and transformer-lens' attention leaves it out
            module.register_forward_hook(count(f"{name} after"))
            module.register_forward_pre_hook(count(f"{name} before"))
    model(TOKENS)
    bare = dict(counts)
    counts.clear()
    model.run_with_cache(TOKENS)
    assert counts == bare


def test_backward_hooks_on_the_models_own_modules_run_whoever_looks(model: Any) -> None:
    model.run_with_cache(TOKENS)

    def gradient(looks: bool) -> Tensor:
        model.zero_grad()
        logits = model.run_with_cache(TOKENS)[0] if looks else model(TOKENS)
        logits.square().mean().backward()
        return next(p.grad.clone() for p in model.body.blocks[0].parameters() if p.grad is not None)

    before = gradient(False)
    for _, _, module in parts(model.original_model, "mlp"):
        module.register_full_backward_hook(lambda m, given, got: tuple(2 * g for g in given))
    bare = gradient(False)
    assert not torch.allclose(bare, before)
    assert torch.allclose(gradient(True), bare, atol=1e-6)


@torch.no_grad()
def test_values_set_on_modules_hold_without_new_modules(model: Any) -> None:
    model.run_with_cache(TOKENS)
    inner = model.blocks[0].attn.original_component
    norm_values(model.original_model)
    logits, _ = model.run_with_cache(TOKENS)
    assert torch.allclose(logits, model(TOKENS), atol=1e-5)
    assert model.blocks[0].attn.original_component is inner


def test_a_part_that_is_gone_is_named_and_nothing_is_changed() -> None:
    model = open_(make("llama"))
    expected, cache = model.run_with_cache(TOKENS)
    mlp = model.body.blocks[1].mlp
    held, mlp.up_proj = mlp.up_proj, None
    del mlp.up_proj
    with pytest.raises(RuntimeError, match="has no 'up_proj'"):
        model.run_with_cache(TOKENS)
    mlp.up_proj = held
    logits, after = model.run_with_cache(TOKENS)
    assert torch.equal(logits, expected) and after.keys() == cache.keys()


def test_changes_after_weight_processing_say_what_to_do() -> None:
    model = open_(make("llama"))
    model.enable_compatibility_mode(disable_warnings=True)
    model.run_with_cache(TOKENS)
    replaced(model.original_model)
    with pytest.raises(RuntimeError, match="change the model first"):
        model.run_with_cache(TOKENS)


@torch.no_grad()
def test_attention_of_another_class_is_run_not_computed_anew() -> None:
    class Uniform(type(make("llama").model.layers[0].self_attn)):  # type: ignore[misc]
        """Attends to all positions alike."""

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            """Mean of the values."""
            return self.o_proj(
                self.q_proj(hidden_states) + self.v_proj(hidden_states).mean(1, True).repeat(1, 1, 2)
            ), None

    model = open_(make("llama"))
    model.run_with_cache(TOKENS)
    for block in blocks_of(model.original_model):
        own = block.self_attn
        block.self_attn = Uniform(own.config, own.layer_idx)
    bare = model(TOKENS)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.allclose(logits, bare, atol=1e-5) and "blocks.1.attn.q.hook_out" in cache
