"""The stages of inference of any looped model, beside a feed-forward one."""
