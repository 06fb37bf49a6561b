"""Search over merge weights: strategies, baselines at equal budget, and the loop around them."""
