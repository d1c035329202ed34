"""What chapters share: studies of traits and of aligned models, and their controls."""
