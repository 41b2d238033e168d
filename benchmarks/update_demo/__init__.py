"""`make demo-update`: a better expert goes to ten agents under load, in waves; three broken releases stop at the canary."""
