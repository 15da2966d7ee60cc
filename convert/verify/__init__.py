"""Verify model directories: their files, and their weights and outputs against PyTorch files."""
