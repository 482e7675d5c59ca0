"""The paper's random part: norms, with and without injection, in looped models with random weights."""
