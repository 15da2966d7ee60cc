"""Training data: annotations become records, records become batches."""
