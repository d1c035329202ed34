"""Chapter `refusal_redistribution`: its parameters, mathematics, stages, measurements and exercises."""
