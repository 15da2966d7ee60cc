"""Estimates of the memory and the floating-point operations of a model."""
