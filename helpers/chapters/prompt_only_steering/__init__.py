"""Chapter `prompt_only_steering`: its parameters, mathematics, stages, measurements and exercises."""
