"""Studies on the miniature: each trains a few branches with one change and compares their measures (docs/studies/)."""
