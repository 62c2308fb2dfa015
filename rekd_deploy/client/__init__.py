"""Requests: to a server, or to the graphs in this process. torch-free."""
