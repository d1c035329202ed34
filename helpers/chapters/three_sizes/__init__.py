"""Chapter `three_sizes`: its parameters, mathematics, stages, measurements and exercises."""
