"""One file a chapter: that finding's mathematics and nothing else."""
