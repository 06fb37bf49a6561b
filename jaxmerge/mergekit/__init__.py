"""The YAML of mergekit and of mergekit-evolve, made into a plan for a merge, or into a config."""
