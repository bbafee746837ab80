"""Experiment loggers: CSV, TensorBoard and W&B; none of them ends a run by failing."""
