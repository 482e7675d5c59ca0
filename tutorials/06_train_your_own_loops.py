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
# # Train your own loops
#
# **From nothing to a model that thinks one step per iteration, in three minutes on one core.**
#
# To ask what a part of a looped model is for, one trains it with and without that part. This notebook trains the kind of model
# that [tutorial 0](00_one_hop_per_iteration.ipynb) opens: a prelude, a core that is run a random number of times, a coda. The
# task is to follow the arrows of a random cycle.

# %%
import math
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import loop_lens
from loop_lens import LoopedConfig, LoopedTransformer
from loop_lens.data import HopsTask
from loop_lens.dynamics import convergence
from loop_lens.training import Curriculum, TrainingConfig, Uniform, evaluate, train

torch.set_num_threads(1)  # so small a model gains nothing from more
task = HopsTask(queries=(8, 8, 4, 2))
example = task.batch(1, level=4, generator=torch.Generator().manual_seed(0), split="test")
words = task.tokenizer.convert_ids_to_tokens(example.input_ids[0].tolist())
answers = ["" if i < 0 else task.tokenizer.convert_ids_to_tokens(i) for i in example.labels[0].tolist()]
print("prompt:", " ".join(words))
print("labels:", " ".join(f"{a:>{len(w)}}" for w, a in zip(words, answers, strict=True)))

# %% [markdown]
# Labels stand where they are asked for: the logits *at* the i-th arrow should name the i-th successor. While one hop is being
# learnt a sequence asks all eight questions about its cycle, later fewer. That is not decoration: with one question per sequence, an earlier
# recipe took 6,400 steps of 128 sequences to learn the first hop. Cycles are split by a hash, so no test cycle is ever trained on.
#
# ## A model
#
# Weights are drawn when the model is made, so the seed comes first. An untrained model should be as unsure as the
# vocabulary is large.

# %%
torch.manual_seed(0)
model = LoopedTransformer(
    LoopedConfig(
        vocab_size=task.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        prelude_layers=1,
        core_layers=2,
        coda_layers=1,
        recurrences=8,  # what it runs by default, afterwards
        injection="linear",
        initial_state="noise",
    )
)
batch = task.batch(64, level=1, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(batch.input_ids).logits
loss = float(cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))
print(
    f"{model.num_parameters():,} parameters; loss {loss:.2f}, log of the vocabulary {math.log(task.vocab_size):.2f}"
)
assert abs(loss / math.log(task.vocab_size) - 1) < 0.05

# %% [markdown]
# ## Training
#
# Level h asks for h hops. The curriculum goes on to the next level when 96% of the answers are right, and each step runs one to three
# iterations more than there are hops. Initial states are noise, drawn anew for every row.

# %%
config = TrainingConfig(
    steps=4000,
    batch_size=32,
    lr=1e-3,
    warmup=200,
    recurrences=Uniform(1, 3, per_level=1),
    curriculum=Curriculum(levels=(1, 2, 3, 4), threshold=0.96, settle=200),
    schedule="1-sqrt",
    cooldown=200,
    checkpoint_every=200,
)
folder = Path(tempfile.mkdtemp())
result = train(model, task, config, folder=folder / "hops")
result.plot()

# %% [markdown]
# For hundreds of steps nothing happens, then the first hop is learnt all at once: a head in the prelude must find out who
# stands before whom before a head in the loop can look anything up, and neither is of use without the other. Every further
# hop costs a small part of that, since the loop already knows how to hop.

# %%
first, *later = (b - a for a, b in zip((0, *result.passed.values()), result.passed.values(), strict=False))
assert list(result.passed) == [1, 2, 3, 4]
assert max(later[1:]) < first / 2
for level, step in result.passed.items():
    print(f"level {level} was passed after {step} steps")

# %% [markdown]
# ## What it learnt
#
# `evaluate` reads all numbers of iterations from one forward. Four hops were trained; we ask for six.

# %%
found = evaluate(model, task, recurrences=range(1, 13), levels=[4, 6], n=256, seed=1)
found.plot()

# %%
table = found.to_dataframe().pivot(index="recurrences", columns="level", values="accuracy")
assert table.loc[12, 4] > 0.97
assert table.loc[1, 4] < 0.5  # one iteration is one hop
print("four hops, trained, and six, never trained, after 1, 2, 4, 8 and 12 iterations:")
table.loc[[1, 2, 4, 8, 12]].round(2)

# %% [markdown]
# ## Open it
#
# The trained model is a folder of safetensors. Opened, it is a looped model like any other.

# %%
opened = loop_lens.boot(folder / "hops" / "model", recurrences=24)
prompt = "a b g a h e e c b h d g c f f d ? c -> -> -> ->"
with opened.at_recurrences(6):
    read = loop_lens.lens(opened, prompt, kind="coda", positions=range(18, 22))
read.plot()

# %%
settling = convergence(opened, example.input_ids, reference=96)
steps = settling.mean("relative_step")[1:, -1]
print("the state settles:", bool(steps[-1] < steps[0] / 20))
settling.plot("relative_step")

# %% [markdown]
# ## Killed, and gone on
#
# Data, iterations and noise are functions of the seed and the step, and checkpoints hold everything else. A training that is
# killed goes on from its last checkpoint and ends with the same weights, bit for bit.

# %%
short = TrainingConfig(steps=30, batch_size=32, recurrences=Uniform(2, 4), checkpoint_every=10)


def fresh():
    torch.manual_seed(1)
    return LoopedTransformer(model.config)


def killed(record):
    if record.step == 17:
        raise KeyboardInterrupt


whole = train(fresh(), task, short, folder=folder / "whole", progress=False).model
try:
    train(fresh(), task, short, folder=folder / "parts", progress=False, on_step=killed)
except KeyboardInterrupt:
    print("killed")
again = train(fresh(), task, short, folder=folder / "parts", progress=False).model
assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
print("and the same")

# %% [markdown]
# ## Ask your own question
#
# Change one field of the configuration and train again: `injection="none", initial_state="prelude"` is the model that wanders off in tutorial
# 0, `block_norm="sandwich", loop_norm=True, exit_gate=True` with `ExitGateLoss()` is a small Ouro. Both come with the package, as
# `loop-lens/hops-no-injection` and `loop-lens/hops-ouro`. `python -m loop_lens.experiments ablation` asks the question
# of a whole grid, and `loop_lens.training.retrofit` makes a looped model of a pretrained one.
