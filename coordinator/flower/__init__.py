"""What carries releases to SuperNodes by Flower (flwr), where it is installed. Nothing else of the gateway needs it.

`layout` where its files lie, `superlink` the child of `bmoe up`, `host` the child beside it: the door for SuperNodes
(`proxy`), their keys (`register`), and the run of the app whose ServerApp is `bridge`. `post` is the coordinator's end.
"""
