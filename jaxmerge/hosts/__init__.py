"""Several processes: how they start and agree, their watch, and signals that end them."""
