"""A Ray cluster of several machines: started, joined, left and examined with one command each.

`supervisor` runs on every machine and owns its `ray start`; `door` is where a joiner asks before it starts Ray;
`state` is what this machine knows of the clusters that it is part of. Only `drain` talks to Ray, in its own process.
"""
