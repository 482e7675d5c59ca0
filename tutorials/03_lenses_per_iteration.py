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
# # Lenses per iteration
#
# **What would the model say if it stopped here? Four lenses give four answers. Which of them is right, and about what?**
#
# SmolLM2-135M with layers 10 to 19 run twice, on *The capital of France is*. The logit lens reads every block's output as if it
# were the last: final norm, unembedding. One call reads all forty firings; here are those of the loop's ends and of the last
# layers, with the most likely token in each cell.

# %%
from pathlib import Path

import torch

import loop_lens
from loop_lens.interventions import LogitDiff, PathNode, path_patch
from loop_lens.lenses import exit_curve, fit_tuned_lens
from loop_lens.shipped.smollm2 import load_smollm2

torch.set_grad_enabled(False)
torch_model, tokenizer = load_smollm2()
model = loop_lens.loopify(torch_model, layers=range(10, 20), times=2, tokenizer=tokenizer)
model.cfg.default_prepend_bos = False

prompt = "The capital of France is"
sites = [
    "prelude.blocks.9",
    "loop.0.blocks.9",
    "loop.1.blocks.9",
    *(f"coda.blocks.{i}" for i in range(1, 10)),
]
sites = [f"{site}.hook_resid_post" for site in sites]
logit = loop_lens.lens(model, prompt, sites=sites, targets=[" Paris", " Rome"])
logit.plot()

# %% [markdown]
# " Paris" appears at the last word in the last layers, and nowhere before. At which firing exactly?

# %%
everywhere = loop_lens.lens(model, prompt, targets=" Paris", positions=[-1])
ranks = everywhere.target_ranks[:, 0, 0, 0]
for segment in ("prelude", "loop", "coda"):
    own = [i for i, name in enumerate(everywhere.segments) if name == segment]
    print(
        f"{segment:<8} best rank of Paris {int(ranks[own].min()) + 1:>5}, last {int(ranks[own[-1]]) + 1:>5}"
    )
print("first on top:", everywhere.first_on_top())
assert everywhere.first_on_top() == "coda.blocks.9.hook_resid_post"

# %% [markdown]
# Through the whole loop " Paris" is thousands of tokens down. Does the model not know it yet, or does the lens not see it? The
# middle layers may write in a basis of their own. A *tuned lens* learns a translation for each site, here from a few pages of text, and
# keeps it only where it helps on pages that it did not see.

# %%
text = Path("pages.txt").read_text()
few = [sites[i] for i in (0, 1, 2, 4, 7)]
trained = fit_tuned_lens(
    model,
    text,
    sites=few,
    rank=32,
    steps=30,
    batch_size=2,
    seq_len=48,
    learning_rate=3e-3,
    progress=False,
)
tuned = loop_lens.lens(model, prompt, kind=trained, sites=few, targets=" Paris", positions=[-1])
plain = loop_lens.lens(model, prompt, sites=few, targets=" Paris", positions=[-1])
print(f"{'':<18}{'KL on unseen text, nats':>26}{'rank of Paris':>22}")
print(f"{'':<18}{'logit':>13}{'tuned':>13}{'logit':>11}{'tuned':>11}")
for i, site in enumerate(few):
    row = trained.report.iloc[i]
    place = site.removesuffix(".hook_resid_post")
    before, after = (int(read.target_ranks[i, 0, 0, 0]) + 1 for read in (plain, tuned))
    print(f"{place:<18}{row.logit_kl:>13.1f}{row.tuned_kl:>13.1f}{before:>11}{after:>11}")
assert (trained.report.tuned_kl < 0.75 * trained.report.logit_kl).all()
assert (tuned.target_ranks[:3] > 100).all()

# %% [markdown]
# The translation more than halves the distance to what the model will say, in the middle by more than that. So the middle does
# have a basis of its own. But " Paris" stays far down inside the loop. It is not hidden from the lens; it is not there, not at this
# word: patching (tutorial 2) found it at the word *France*, from which a head of the coda fetches it.
#
# ## What the model itself would say
#
# The *coda lens* runs the blocks after the loop from the state after each pass. That is not a guess: it is the model at that many
# passes.

# %%
coda = loop_lens.lens(model, prompt, kind="coda", targets=" Paris", positions=[-1], keep_logits=True)
for t, name in enumerate(coda.sites):
    with model.at_recurrences(t + 1):
        direct = model(prompt)[0, -1]
    same = torch.allclose(direct, coda.logits[t, 0, 0], atol=1e-4)
    top = coda.top_words[int(coda.top_ids[t, 0, 0, 0])]
    print(
        f"{name}: {top!r} {float(coda.target_probs[t, 0, 0, 0]):.2f}, the model at R = {t + 1}: {'the same' if same else 'other'}"
    )
    assert same

# %% [markdown]
# So three lenses look at one state and differ by design: the logit lens asks what is legible *now*, the tuned lens what is there in
# *any linear code*, the coda lens what the rest of the model *makes of it*. After the first pass the answers are: nothing, nothing, Paris.
# (Models with an exit of their own, Ouro and HRM-Text, have a `native` lens; for them nothing comes after the loop. This model
# was never trained to be read there, and `kind="native"` says so.)
#
# ## A sum that is the logit
#
# Attribution splits the logit difference Paris - Rome into what each head and MLP of each pass wrote into the stream.

# %%
found = loop_lens.attribute(model, prompt, target=(" Paris", " Rome"))
logits = model(prompt)[0, -1]
paris, rome = model.to_single_token(" Paris"), model.to_single_token(" Rome")
print(
    f"sum of {len(found.labels)} terms {float(found.total):.4f}, Paris - Rome {float(logits[paris] - logits[rome]):.4f}"
)
assert abs(float(found.total - logits[paris] + logits[rome])) < 1e-3
groups = found.group("iteration")
print(
    ", ".join(
        f"{label} {term:+.2f}" for label, term in zip(groups.labels, groups.terms.tolist(), strict=True)
    )
)
found.plot(top=16)

# %% [markdown]
# Everything comes from the coda; both passes of the loop together contribute less than nothing. The largest term is the head that
# tutorial 2 found by patching. And yet patching one MLP of the loop moved a sixth of the difference. No contradiction:
# attribution counts what a component writes into the *last word's own stream*; what it hands to others counts as theirs. Path
# patching puts the two side by side:

# %%
other, metric = "The capital of Italy is", LogitDiff(" Paris", " Rome")
writer = PathNode("mlp_out", iteration=0, layer=3)
for mediators, what in (((), "directly"), ("all", "through anything")):
    effect = path_patch(model, prompt, other, metric, senders=writer, mediators=mediators).effect.item()
    print(f"the MLP of pass 0, layer 3, {what}: {effect:+.2f}")
term = found.terms[found.labels.index("loop.0.l3.mlp")].item()
print(f"its term in the sum: {term:+.2f}")
assert abs(term) < 0.5

# %% [markdown]
# ## Where plain decomposition fails
#
# In this model the stream is one sum, so TransformerLens' own decomposition would do. In most looped models it is not: an injection
# mixes the state with a matrix, norms stand between blocks and between passes. Here are three small random models of published
# shapes, with each component's output simply projected onto the unembedding, and with it carried through what comes after.

# %%
shapes = {
    "as Huginn": {"block_norm": "post_residual", "injection": "linear", "post_loop_norm": True},
    "as Ouro": {
        "block_norm": "sandwich",
        "injection": "none",
        "loop_norm": True,
        "prelude_layers": 0,
        "coda_layers": 0,
    },
    "as a retrofit": {"block_norm": "pre", "injection": "linear"},
}
for shape, options in shapes.items():
    torch.manual_seed(0)
    start = "prelude" if options["injection"] == "none" else "noise"
    config = loop_lens.LoopedConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        recurrences=4,
        initial_state=start,
        **options,
    )
    small = loop_lens.wrap(loop_lens.LoopedTransformer(config).eval())
    tokens = torch.arange(1, 7)[None]
    logits, cache = small.run_with_cache(tokens)
    outs = [
        cache[f"{f.prefix}.{out}"][0, -1] for f in small.schedule for out in ("hook_attn_out", "hook_mlp_out")
    ]
    stream = cache["embed.hook_out"][0, -1] + sum(outs)
    plain_sum = float(small.unembed(small.ln_final(stream[None, None]))[0, 0, 7])
    carried = float(loop_lens.attribute(small, tokens, target=7).total)
    print(
        f"{shape:<14} logit {float(logits[0, -1, 7]):+.4f}, carried {carried:+.4f}, plain sum {plain_sum:+.4f}"
    )
    assert abs(carried - float(logits[0, -1, 7])) < 1e-4

# %% [markdown]
# ## When to stop
#
# If a readout is there after every pass, a rule can decide to stop. Huginn's rules compare a pass with the one before. We give the
# model five passes of text and ask the KL rule at several thresholds how many it would use, and how often the exit says what
# the full depth says, and what the text says.

# %%
with model.at_recurrences(5):
    page = model.to_tokens(text[:1500])[:, :200]
    curve = exit_curve(model, page, rule="kl", thresholds=[0.02, 0.05, 0.2, 0.5, 2.0]).to_dataframe()
print(curve.to_string(index=False, float_format="{:.2f}".format))
assert curve.agreement.is_monotonic_decreasing
assert curve.accuracy.iloc[-1] > curve.accuracy.iloc[0]

# %% [markdown]
# Stopping early changes what is said, and here for the better: this loop was never trained, and each further pass wears the
# prediction out (tutorial 1). The rule does not know that. Agreement with full depth is only a virtue if full depth is.
#
# ## What you saw
#
# - The logit and tuned lens see what is legible at a position, the coda lens what the model does with it; the last is exact.
# - Attribution sums to the logit through injections and norms, and counts direct contributions only; patching counts all.
# - Exit rules trade passes for agreement; `find_exits` says where each token would stop and what it would say.
