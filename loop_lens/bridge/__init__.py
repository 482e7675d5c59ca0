"""A looped model as transformer-lens sees it: blocks, hook points, caches, weights."""
