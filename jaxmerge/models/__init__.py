"""Models: the contract that evaluation needs, and the decoders that fulfil it."""
