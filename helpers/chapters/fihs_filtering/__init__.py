"""Chapter `fihs_filtering`: its parameters, mathematics, stages, measurements and exercises."""
