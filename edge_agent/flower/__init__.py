"""The SuperNode beside an agent: a process of its own, started on an update message, ended when the update is.

Nothing here is imported on the task path, and an agent without flwr fetches over HTTPS instead.
"""
