"""`make bench-update`: what it costs to bring a 5 MB expert to a fleet, beside plain HTTP and beside Flower alone."""
