"""Chapter `looking_inside`: its parameters, mathematics, stages, measurements and exercises."""
