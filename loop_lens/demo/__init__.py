"""``python -m loop_lens.demo``: watch a looped model think one step per iteration, and change a step."""
