"""Training: what a run is (config), the optimizer, the step, and the loop around it."""
