# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A loop, opened
#
# **Run the middle third of a language model three times instead of once. Where does "Paris" go?**
#
# SmolLM2-135M has thirty layers and knows the capital of France. We let layers 10 to 19 run three times per
# forward, with the same weights: the simplest looped model there is, and one for which nobody trained the loop. Such
# a model is opaque to ordinary tools. Its layer 14 fires three times, a hook on layer 14 fires three times, a cache
# keeps the last of the three, and a patch lands on all of them. This notebook opens the loop with `loop_lens`, so that
# every firing has a name of its own, and then asks the three questions that one asks of any model: what does it read
# at each step, what does it depend on, and where does it look?
#
# The picture first. Each dot is one firing of one block, in the order in which they run; its height is how many
# tokens the logit lens ranks above " Paris" after that block, at the last word of *The capital of France is*.

# %%
import matplotlib.pyplot as plt
import torch
from transformer_lens.tools.analysis import logit_readout

import loop_lens
from loop_lens.shipped.smollm2 import load_smollm2

torch.set_grad_enabled(False)
torch_model, tokenizer = load_smollm2()
model = loop_lens.loopify(torch_model, layers=range(10, 20), times=3, tokenizer=tokenizer)
model.cfg.default_prepend_bos = False  # SmolLM2 was trained on prompts without one

tokens = model.to_tokens("The capital of France is")
logits, cache = model.run_with_cache(tokens)
paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")

stream = torch.stack([cache[firing.prefix + ".hook_resid_post"][0, -1] for firing in model.schedule])
readout = logit_readout(model, stream, targets=[paris])
ranks = readout.target_ranks[:, 0]

figure, axes = plt.subplots(figsize=(9, 3.2))
colours = {"prelude": "tab:gray", "coda": "tab:gray", 0: "tab:blue", 1: "tab:orange", 2: "tab:green"}
for firing in model.schedule:
    key = firing.segment if firing.iteration is None else firing.iteration
    axes.plot(firing.index, ranks[firing.index] + 1, "o", color=colours[key])
for t in range(3):
    axes.axvspan(9.5 + 10 * t, 19.5 + 10 * t, color=colours[t], alpha=0.1)
    axes.text(14.5 + 10 * t, 2, f"iteration {t}", ha="center", color=colours[t])
axes.set(yscale="log", xlabel="firing", ylabel='rank of " Paris"')
figure.tight_layout()

# %% [markdown]
# Nothing happens to " Paris" inside the loop. It arrives in the thousands, leaves in the thousands, whichever iteration
# one looks at, and climbs to the top only in the last third, which runs once. So is the loop idle? We can find out,
# since every dot above is a site that we can read and write.
#
# ## Names
#
# The *schedule* lists what runs, in order. To TransformerLens the model has one layer per firing, here fifty; to us a
# firing is a segment, an iteration and a layer. Both spellings name the same hook point, wherever TransformerLens takes
# a name.

# %%
print(model.schedule)
firing = model.schedule[34]
print(f"\nfiring 34 is iteration {firing.iteration}, layer {firing.layer} of the {firing.segment}")

loop_name = model.name("resid_post", iteration=2, layer=4)
flat_name = f"blocks.{firing.index}.hook_resid_post"
print(loop_name, "is", flat_name)
assert cache[loop_name] is cache[flat_name]
print("weights in memory:", f"{model.n_params:,}", "parameters, as without the loop")
assert model.n_params == sum(p.numel() for p in torch_model.parameters())

# %% [markdown]
# A name that does not exist is an error that says what there is, not an empty cache:

# %%
try:
    model.name("resid_post", iteration=3, layer=4)
except KeyError as error:
    print(error)

# %% [markdown]
# ## How far does each iteration move the state?
#
# `cache.grid` stacks a site over iterations and layers. We compare each layer's output with the same layer's output one
# iteration earlier: the distance, relative to its length, averaged over positions. A loop that settles makes it shrink.

# %%
resid = cache.grid("resid_post")[:, :, 0]  # [iteration layer pos d_model]
step = (resid[1:] - resid[:-1]).norm(dim=-1) / resid[1:].norm(dim=-1)
step = step.mean(-1)  # [iteration - 1, layer]
for t, row in enumerate(step, start=1):
    print(f"from iteration {t - 1} to {t}:", " ".join(f"{value:.2f}" for value in row))
assert (step[1] < step[0]).all()

# %% [markdown]
# Every layer moves less in the third pass than in the second. The stream is on its way to somewhere, at a pace that falls
# by a quarter to a half each time; whether it would ever arrive is the subject of another tutorial. The loop is not
# idle, then: it rewrites a fifth to a third of the stream on every pass. But does the model need what it writes?
#
# ## What each iteration reads
#
# The logit lens at the end of each iteration reads the state as if the model stopped there: final norm, unembedding.

# %%
for t, state in enumerate(cache.over_iterations("state_out")[:, 0, -1]):
    top = logit_readout(model, state, top_k=5).top_ids
    print(f"after iteration {t}:", " ".join(repr(model.to_single_str_token(int(i))) for i in top))
top = logits[0, -1].topk(5).indices
print("output:           ", " ".join(repr(model.to_single_str_token(int(i))) for i in top))

# %% [markdown]
# Punctuation, three times over: the middle of this model does not speak the language of its output yet. That is normal for
# middle layers, and a reason to ask what the lens cannot answer: which activations *matter*?
#
# ## Patch one iteration
#
# We run *The capital of Italy is*, and put its residual stream into the run on France at one place: one iteration, one
# layer, one position. TransformerLens' own machinery does it; the only new thing is that the name says which iteration.
# What we plot is the change of the logit difference between " Paris" and " Rome".

# %%
_, italy = model.run_with_cache("The capital of Italy is", names_filter=model.names("resid_post"))


def difference(logits):
    """Logit difference Paris - Rome at the last position."""
    return (logits[0, -1, paris] - logits[0, -1, rome]).item()


def patched(iteration, layer, position):
    """The difference when one firing's output at one position is Italy's."""

    def patch(value, hook):
        value[:, position] = italy[hook.name][:, position]
        return value

    name = model.name("resid_post", iteration=iteration, layer=layer)
    return difference(model.run_with_hooks(tokens, fwd_hooks=[(name, patch)]))


words = model.to_str_tokens(tokens)
clean = difference(logits)
grids = {
    position: torch.tensor([[patched(t, layer, position) - clean for layer in range(10)] for t in range(3)])
    for position in (words.index(" France"), len(words) - 1)
}
figure, panels = plt.subplots(1, 2, figsize=(9, 2.2), sharey=True)
for axes, (position, grid) in zip(panels, grids.items(), strict=True):
    image = axes.imshow(grid, cmap="RdBu", vmin=-13, vmax=13, aspect="auto")
    axes.set(title=f"at {words[position]!r}", xlabel="layer of the loop", ylabel="iteration", yticks=range(3))
figure.colorbar(image, ax=panels, label="change of Paris - Rome")

print(f"Paris - Rome: {clean:+.2f}")
for position, grid in grids.items():
    print(f"patched at {words[position]!r}: changes between {grid.min():+.2f} and {grid.max():+.2f}")
at_france, at_last = grids.values()
assert at_france.max() < -clean and at_last.abs().max() < 1

# %% [markdown]
# Now it is plain. All through the loop, in every iteration and every layer, the word " France" carries the answer: replace
# the stream there and the model says Rome, whenever one does it. The last word carries nothing yet: replace it, and
# the answer hardly moves. The country is looked up *at the country*, and moved to the end by layers that run after the
# loop. Three passes over the middle change neither.
#
# ## Take an iteration away
#
# If the passes do not carry the answer forward, we should be able to drop one. Skipping iteration t means that its output
# is its input, which we write with one hook.


# %%
def probability(logits):
    """Probability of Paris as the next token."""
    return logits[0, -1].softmax(-1)[paris].item()


def without(iteration):
    """Logits of a run in which one iteration leaves the state as it was."""
    state = cache[model.name("state_in", iteration=iteration)]
    name = model.name("state_out", iteration=iteration)
    return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: state)])


print(f"three iterations: {probability(logits):.2f}")
skipped = [without(t) for t in (0, 2)]
print("without the first, or the last:", " ".join(f"{probability(run):.2f}" for run in skipped))
with model.at_recurrences(2):
    two = model(tokens)
print(f"with two iterations: {probability(two):.2f}")
assert all(torch.allclose(run, two, atol=1e-3) for run in skipped)

for recurrences in (1, 2, 3, 4, 6):
    with model.at_recurrences(recurrences):
        print(f"R = {recurrences}: {probability(model(tokens)):.6f}")

# %% [markdown]
# Dropping any pass *helps*, and by the same amount, since all passes have the same weights: to skip one is to run one
# fewer. Two passes are as good as one, the third makes the model unsure, and with more the answer is gone. So the loop
# does something after all: without training for it, every further pass pushes the stream a little further from where
# the last ten layers expect it. (Damped rules push less: `loopify(..., rule="euler")`. Models trained with a loop
# learn to stay where they can be read.)
#
# ## Where one head looks
#
# Last, attention. Patterns are cached per iteration like everything else; we take the head whose pattern moves most
# between the first pass and the last.

# %%
patterns = cache.grid("pattern")[:, :, 0]  # [iteration layer head query key]
moved = (patterns[-1] - patterns[0]).norm(dim=(-2, -1))
layer, head = divmod(int(moved.argmax()), moved.shape[1])
figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
for t, axes in enumerate(panels):
    axes.imshow(cache.over_iterations("pattern", layer=layer)[t, 0, head], cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"iteration {t}", xticks=range(len(words)), yticks=range(len(words)))
    axes.set_xticklabels(words, rotation=60)
    axes.set_yticklabels(words)
figure.suptitle(f"Layer {10 + layer}, head {head}")
figure.tight_layout()

shift = 0.5 * (patterns[1:] - patterns[:-1]).abs().sum(-1).mean(dim=(-2, -1))  # total variation
for t, row in enumerate(shift, start=1):
    print(f"attention moved from iteration {t - 1} to {t}:", " ".join(f"{value:.2f}" for value in row))
assert shift[1].mean() < shift[0].mean()

# %% [markdown]
# On average attention moves half as far in the third pass as in the second: heads look at about the same
# places each time round, and more so the longer one waits.
#
# ## What you saw
#
# - One name per firing, in two spellings; a schedule that lists them before anything runs.
# - `over_iterations` and `grid` turn a cache into tensors with an iteration axis.
# - Patching, the logit lens and attention patterns are TransformerLens' own, used as they are.
# - On this prompt the answer sits at " France" through all passes; the loop refines the stream and, untrained, wears it out.
#
# Everything here runs on any looped model: `loop_lens.boot("tomg-group-umd/huginn-0125", recurrences=32)` opens Huginn the
# same way, with `loop.31.blocks.2.hook_resid_post` where you would expect it.
