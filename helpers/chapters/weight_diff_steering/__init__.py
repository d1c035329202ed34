"""Chapter `weight_diff_steering`: its parameters, mathematics, stages, measurements and exercises."""
