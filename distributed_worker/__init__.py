"""Ray: the workers, their devices, the weights that they share, and what happens when one fails.

`cluster` is the way in. Nothing here imports a host: which one the workers run is handed in as a dotted path.
"""
