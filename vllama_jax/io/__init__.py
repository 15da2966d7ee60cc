"""Reading and writing of files: JSON from outside."""
