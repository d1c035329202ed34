"""From arrays to measurements: what each claim is judged by, chapter by chapter, in functions without a model."""
