"""Hyper-parameter search with Optuna: `python -m var_exp.experiment.search`."""
