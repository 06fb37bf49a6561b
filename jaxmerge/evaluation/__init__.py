"""From text to tokens to answers to scores, for many merged models."""
