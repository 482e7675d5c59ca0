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
# # Attention across iterations
#
# **The same head, eight times in one forward. Does it look at the same place every time?**
#
# In [tutorial 0](00_one_hop_per_iteration.ipynb) a looped model answers one more question per iteration. Its loop has two layers of four heads,
# so whatever it does at iteration 5 is done by the same eight heads as at iteration 0. Here we watch them.

# %%
import matplotlib.pyplot as plt
import torch

import loop_lens
from loop_lens.data import HopsTask
from loop_lens.dynamics import attention_bound, attention_settling, firing_similarity
from loop_lens.interventions import freeze

torch.set_grad_enabled(False)
model = loop_lens.boot("loop-lens/hops")
task = HopsTask()
batch = task.batch(64, level=6, generator=torch.Generator().manual_seed(1), split="test")
tokens, arrows = batch.input_ids, range(18, 24)
print("one of the prompts:", " ".join(model.to_str_tokens(tokens[0])))

_, cache = model.run_with_cache(tokens, names_filter=model.names("pattern"))
patterns = cache.grid("pattern")  # [iteration layer prompt head query key]
print("patterns:", "iterations, layers, prompts, heads, queries, keys")
assert patterns.shape == (8, 2, 64, 4, 24, 24)

# %% [markdown]
# ## Two jobs
#
# To hop, an arrow needs two things: the symbol that the arrow before it has reached, and the pair in the prompt that says what
# follows that symbol. So we ask of every head and iteration how much of an arrow's attention goes to the arrow before
# it (for the first arrow, to the start), and how much to the second symbol of the pair that it needs.

# %%
where = torch.zeros(64, 8, dtype=torch.long)  # the position of what follows each symbol
where.scatter_(1, tokens[:, 0:16:2], torch.arange(1, 16, 2).expand(64, 8))
symbol, needed = tokens[:, 17], []
for _ in arrows:
    needed.append(where.gather(1, symbol[:, None])[:, 0])
    symbol = tokens.gather(1, needed[-1][:, None])[:, 0]
needed = torch.stack(needed, 1)  # [prompt arrow]

rows = patterns[..., arrows.start :, :]  # [iteration layer prompt head arrow key]
to_pair = rows.gather(-1, needed[None, None, :, None, :, None].expand(*rows.shape[:-1], 1))[..., 0]
to_before = torch.stack([rows[..., i, arrows.start - 1 + i] for i in range(6)], -1)
carry, lookup = (x.mean(2) for x in (to_before, to_pair))  # [iteration layer head arrow]

figure, axes = plt.subplots(2, 4, figsize=(10, 5), layout="constrained", sharex=True, sharey=True)
chosen = [("arrow before", carry, 0), ("pair needed", lookup, 1)]
for row, (name, values, layer) in zip(axes, chosen, strict=True):
    for head, panel in enumerate(row):
        image = panel.imshow(
            values[:, layer, head], origin="lower", cmap="Blues", vmin=0, vmax=1, aspect="auto"
        )
        panel.set(title=f"layer {layer}, head {head}: {name}", xticks=range(6), xticklabels=range(1, 7))
        panel.title.set_fontsize(8)
for panel in axes[1]:
    panel.set_xlabel("arrow")
for panel in axes[:, 0]:
    panel.set_ylabel("iteration")
_ = figure.colorbar(image, ax=axes, label="share of attention")

# %% [markdown]
# In layer 0, heads look at the arrow before from the first iteration to the last: they *carry*. In layer 1 two heads *look up*, and
# they are the front itself: an arrow's attention lands on the right pair at the iteration in which its turn comes, and stays there.
# Before its turn it looks nowhere in particular, since it does not know yet what to look for.

# %%
best = lookup[:, 1].amax(1)  # [iteration arrow], the better of the heads
print("looks up at its turn:", bool((best.diagonal() > 0.7).all()))
print("and not before:", bool((best.triu(1)[best.triu(1) > 0] < 0.2).all()))
print("carries at every iteration:", bool((carry[:, 0].amax(1) > 0.8).all()))
assert (best.diagonal() > 0.7).all() and (best.triu(1) < 0.2).all()
assert (carry[:, 0].amax(1) > 0.8).all()

# %% [markdown]
# ## Is it the attention that does it?
#
# `freeze` holds a site at the value it had at one iteration. If layer 1's patterns stay as they were at iteration 2, the arrows
# whose turn has come by then keep their pairs, and the later ones should not find theirs. Freezing layer 0's patterns, which hardly
# change, should cost little.


# %%
def accuracy():
    said = model(tokens)[:, arrows.start :].argmax(-1)
    return (said == batch.labels[:, arrows.start :]).float().mean(0)


print("untouched:             ", " ".join(f"{x:.2f}" for x in accuracy()))
frozen = []
for layer in (0, 1):
    with freeze(model, "pattern", at=2, layers=layer):
        frozen.append(accuracy())
    print(f"layer {layer} frozen from 2 on:", " ".join(f"{x:.2f}" for x in frozen[-1]))
assert (frozen[1][:3] > 0.9).all() and (frozen[1][3:] < 0.6).all()
assert (frozen[0] > 0.9).all()

# %% [markdown]
# ## When does each head settle?
#
# `attention_settling` measures it while the model runs: how far each head's attention moves from one iteration to the next, in
# total variation, and the iteration from which it moves less than a hundredth.

# %%
with model.at_recurrences(24):
    settling = attention_settling(model, tokens, reference=64, progress=False)
assert settling.heads()["settled"].notna().all()  # no head is restless for good
print("every head settles, the last one by iteration", int(settling.settled().max()))
settling.plot()

# %% [markdown]
# Six arrows take six iterations, and then nobody has anything left to do. That attention becomes constant as the states
# reach their fixed points is a finding of [arXiv 2604.11791](https://arxiv.org/abs/2604.11791) on models ten thousand times this size.
#
# ## Every firing against every other
#
# The paper's maps compare the patterns of all pairs of firings; here is the loop of our model, two layers by twelve iterations.

# %%
with model.at_recurrences(12):
    maps = firing_similarity(model, tokens[:16], segment="loop", progress=False)
distance = maps.mean("frobenius")
layer = torch.tensor(maps.layers)
other, same = (distance[(layer[:, None] == layer) == alike].mean() for alike in (False, True))
print("a layer is nearer to itself at other iterations than to the other layer:", bool(same < other / 3))
assert same < other / 3
maps.plot("frobenius")

# %% [markdown]
# The checkerboard says that a layer keeps its job through all iterations. The cyclic picture of the paper, on one page: two
# layers, two jobs, two fixed points.
#
# ## Could attention have moved more?
#
# Proposition 4.2 of the paper bounds a head's step by the step of the state and the norms of its weights. As printed, with the norm of
# the product of query and key weights, it does not cover rotary embeddings: a head whose queries and keys use different rotary planes has
# a product of zero and still moves. With the product of the two norms it is proven, and it holds here, with room to spare.

# %%
bound = attention_bound(model, tokens[:16], progress=False)
share = float(bound.worst["ratio"][1:].max())
print("holds on every prompt, head and iteration:", bound.holds())
print(f"the largest step is {100 * share:.1f}% of what the bound allows")
assert bound.holds() and share < 0.1
