"""Rollouts: a new version of a model goes to the fleet in waves, and goes back by itself when it does harm.

`plan` says who and how fast, `health` judges, `machine` decides what comes next (all three pure); `driver` does it.
"""
