"""Chapter `pps_gradient_reversal`: its parameters, mathematics, stages, measurements and exercises."""
