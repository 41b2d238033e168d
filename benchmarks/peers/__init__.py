"""Us beside hivemind, KServe and Ray Serve: the same expert, the same machine, in one run."""
