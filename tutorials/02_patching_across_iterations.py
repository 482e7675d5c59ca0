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
# %% [markdown]
# # Patching across iterations
#
# **A looped model answers "Paris". Which pass found it out, where was it kept meanwhile, and who fetched it?**
#
# SmolLM2-135M again, layers 10 to 19 run twice with the same weights. *The capital of France is* gives Paris, *The
# capital of Italy is* gives Rome, and the two prompts differ in one word. Wherever France's activations, put into the run
# on Italy, turn Rome into Paris, the model holds what it needs to know. A sweep asks that of every place at once: here of
# the residual stream after each of the forty firings, at each word.

# %%
import matplotlib.pyplot as plt
import torch

import loop_lens
from loop_lens.interventions import (
    LogitDiff,
    PathNode,
    ablate,
    freeze,
    path_patch,
    skip,
    transplant,
)
from loop_lens.shipped.smollm2 import load_smollm2

torch.set_grad_enabled(False)
torch_model, tokenizer = load_smollm2()
model = loop_lens.loopify(torch_model, layers=range(10, 20), times=2, tokenizer=tokenizer)
model.cfg.default_prepend_bos = False

prompts = ("The capital of France is", "The capital of Italy is")
metric = LogitDiff(" Paris", " Rome")
stream = loop_lens.patch_sweep(model, *prompts, metric, site="resid_post", over=("position", "firing"))
stream.plot(what="recovered")

# %% [markdown]
# Blue means that the patch brings Paris all the way back. Two stripes, and nothing else. Through the first ten layers,
# through both passes of the loop and three layers more, *everything* that distinguishes the prompts sits at the country. Then,
# within one firing, it is gone from there and at the last word, where the model answers.

# %%
country, last = stream.recovered[3], stream.recovered[4]
handover = int((last > country).nonzero()[0])
print(f"Paris - Rome: {stream.clean:+.1f} for France, {stream.corrupted:+.1f} for Italy")
print(f"at the country up to firing {handover - 1}: share recovered at least {country[:handover].min():.2f}")
print(f"at the last word from firing {handover}: at least {last[handover:].min():.2f}")
print(model.schedule[handover])
assert country[:handover].min() > 0.98 and last[handover:].min() > 0.98
assert last[:handover].max() < 0.05 and country[handover:].abs().max() < 0.05

# %% [markdown]
# ## Who fetched it
#
# A jump from one position to another in one firing is the work of attention. Sweep over heads:

# %%
heads = loop_lens.patch_sweep(model, *prompts, metric, site="z", over=("firing", "head"))
table = heads.to_dataframe().sort_values("recovered", ascending=False).head(4)
print(table.to_string(index=False, float_format="{:.2f}".format))
mover = table.iloc[0]
assert int(mover.firing) == handover and mover.recovered > 0.8
layer, head = model.schedule[handover].layer, int(mover["head"])

name = model.name("pattern", segment="coda", layer=layer)
_, cache = model.run_with_cache(prompts[0], names_filter=name)
looks = cache[name][0, head, -1]
words = model.to_str_tokens(prompts[0])
print(f"head {head} of coda layer {layer}, at {words[-1]!r}, looks at:", end=" ")
print(", ".join(f"{word!r} {weight:.2f}" for word, weight in zip(words, looks, strict=True)))

# %% [markdown]
# One head does nearly nine tenths of it, in a layer after the loop, and it looks from the last word at the country. So the
# loop keeps the fact and the coda fetches it. What does the second pass do, then?
#
# ## Which pass found it out
#
# Surgery on whole iterations: contexts in which something of the loop is different, for any run within.


# %%
measure = metric.bind(model)
tokens = model.to_tokens(prompts[0])


def under(surgery):
    """Paris - Rome for France, under a surgery."""
    with surgery:
        return measure(model(tokens)).item()


print(f"as it is                                   {stream.clean:+.1f}")
surgeries = {
    "second pass skipped": skip(model, 1),
    "second pass: attention patterns of the first": freeze(model, "pattern", at=0),
    "second pass: attention output of the first": freeze(model, "attn_out", at=0),
    "second pass: MLP outputs of the first": freeze(model, "mlp_out", at=0),
    "first pass without MLPs": ablate(model, "mlp_out", iterations=0),
    "second pass without MLPs": ablate(model, "mlp_out", iterations=1),
}
differences = {what: under(surgery) for what, surgery in surgeries.items()}
for what, value in differences.items():
    print(f"{what:<45}{value:+.1f}")
assert differences["second pass: attention patterns of the first"] > 0.98 * stream.clean
assert differences["second pass skipped"] > 0.85 * stream.clean
assert differences["second pass without MLPs"] < 0

# %% [markdown]
# Attention in the second pass may as well look where it looked in the first: nothing is lost. The whole pass may be skipped at
# little cost. But taking away *its MLPs alone* is worse than skipping it, and makes the model say Rome: a pass without MLPs is
# not a shorter loop but a broken one. Ablations like this one tell that a part is in use, not that it knows something.
#
# Does each pass write the fact in a language of its own? Transplants answer that. We take Italy's state at the country from
# after one pass, and put it into France's run after one pass:

# %%
_, italy = model.run_with_cache(prompts[1], names_filter=model.names("state_out"))
moved = torch.tensor(
    [
        [under(transplant(model, "state_out", source=s, to=t, cache=italy, positions=[3])) for t in (0, 1)]
        for s in (0, 1)
    ]
)
for s, row in enumerate(moved):
    print(
        f"Italy after pass {s}, put into France's run after pass 0: {row[0]:+.1f}, after pass 1: {row[1]:+.1f}"
    )
assert (moved < -5).all()

# %% [markdown]
# All four say Rome, and nearly equally loud. What stands at the country after the first pass can be read after the second
# and the other way round: the passes share one code. That is what makes a loop that nobody trained work at all.
#
# ## Which layer writes it
#
# The stream holds the fact from the start (it holds the word). What turns *France* into something with *Paris* in it? MLPs, swept
# by iteration and layer:

# %%
mlps = loop_lens.patch_sweep(model, *prompts, metric, site="mlp_out", over=("iteration", "layer"))
attention = loop_lens.patch_sweep(model, *prompts, metric, site="attn_out", over=("iteration", "layer"))
for t in (0, 1):
    print(f"pass {t}, MLPs:     ", " ".join(f"{share:+.2f}" for share in mlps.recovered[t]))
    print(f"pass {t}, attention:", " ".join(f"{share:+.2f}" for share in attention.recovered[t]))
writer = mlps.recovered.argmax(1)
print("largest in each pass: layer", ", layer".join(f" {int(i)}" for i in writer))
assert writer[0] == writer[1] and attention.recovered.abs().max() < 0.05

# %% [markdown]
# The same layer in both passes: once in the first, again, a little less, in the second. It runs twice, so it writes twice.
# Attention inside the loop writes nothing that matters here.
#
# ## From the writer to the mover
#
# Two findings, an MLP inside the loop and a head after it. Are they one mechanism? Path patching sends the MLP's clean output along
# chosen paths only: into the query, the key or the value of the mover, or straight to the logits, first with everything in
# between held where it was (*direct*), then with everything free.

# %%
group = head * model.cfg.n_key_value_heads // model.cfg.n_heads
coda = {"layer": layer, "segment": "coda"}
receivers = [
    PathNode("q", head=head, **coda),
    PathNode("k", head=group, **coda),
    PathNode("v", head=group, **coda),
    None,
]
senders = [PathNode("mlp_out", t, int(writer[0])) for t in (0, 1)]
direct = path_patch(model, *prompts, metric, senders=senders, receivers=receivers)
free = path_patch(model, *prompts, metric, senders=senders, receivers=receivers, mediators="all")
whole = stream.clean - stream.corrupted
print(f"{'share of Paris - Rome':<28}{'query':>8}{'key':>8}{'value':>8}{'logits':>8}")
for title, paths in (("direct", direct), ("through anything", free)):
    for sender, effects in zip(senders, paths.effect / whole, strict=True):
        print(f"pass {sender.iteration}, {title:<20}" + "".join(f"{share:8.2f}" for share in effects))
share = free.effect / whole
assert (share[:, 2] > 0.8 * share[:, 3]).all() and share[:, :2].abs().max() < 0.02
assert torch.allclose(share[:, 3], mlps.recovered[:, writer[0]], atol=1e-4)

# %% [markdown]
# They are. The last column of the last two lines is the plain patch from above, and nine tenths of it goes into the *value* of
# the mover: what it carries, not where it looks. Most of that goes there directly, over the stream alone; the direct path to the
# logits is empty, since the country is not the last word. And the path from the first pass runs through the whole second pass
# unharmed.
#
# ## What gradients say
#
# A sweep runs a forward per cell (here, a few dozen batched ones). Attribution patching guesses all cells from one backward pass. How
# well?

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
for axes, method in zip(panels, ("attribution", "integrated"), strict=True):
    for site, patched in (("z", heads), ("resid_post", stream)):
        guess = loop_lens.patch_sweep(model, *prompts, metric, site=site, over=patched.axes, method=method)
        r = torch.corrcoef(torch.stack([guess.effect.flatten(), patched.effect.flatten()]))[0, 1]
        early = guess.recovered[3, :10].mean() if site == "resid_post" else torch.tensor(float("nan"))
        axes.plot(patched.recovered.flatten(), guess.recovered.flatten(), ".", label=f"{site}, r = {r:.3f}")
        print(
            f"{method:<12} {site:<11} correlation {r:.3f}"
            + ("" if early.isnan() else f", prelude {early:.2f}")
        )
        assert r > 0.97
        assert early.isnan() or (early < 0.8 if method == "attribution" else 0.95 < early < 1.05)
    axes.axline((0, 0), slope=1, color="gray", linewidth=0.5)
    axes.set(title=method, xlabel="share recovered by the patch")
    axes.legend()
panels[0].set_ylabel("share estimated")
figure.tight_layout()

# %% [markdown]
# For single heads, which move the stream a little, one gradient is as good as the sweep. For the stream itself it is not: in the
# first ten layers it guesses about seven tenths of an effect that is all of it. The gradient is taken in the run that says Rome, where
# the country's stream has to change a long way before the answer flips, and norms bend everything on that way. Following
# the whole way from Italy to France instead (integrated gradients, sixteen steps) restores the number.
#
# ## What you saw
#
# - The fact sits at the country through the prelude and both passes; one head, after the loop, fetches it.
# - One MLP writes it, once per pass, into the value of that head; the second pass adds the smaller share.
# - Both passes share one code: states can be moved between them, patterns frozen, the second pass skipped.
# - Sweep, surgery, attribution and path patching agree, and where attribution does not, integrated gradients say why.
#
# The same calls work on Huginn, Ouro and every other looped model: `site="state"` sweeps what enters each iteration, and
# `site="injection"` what each is given again.
