"""mergekit's YAML, of merges and of its search: read, evaluated, and made into a plan or a config."""
