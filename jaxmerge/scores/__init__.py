"""What scores mean: the objective, statistics, Pareto fronts, and how a score is written."""
