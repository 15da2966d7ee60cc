"""Programs compiled ahead of time for topologies that are not here, and what their HLO says of memory and time."""
