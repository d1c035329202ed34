"""Chapter `ip_loss_reduction`: its parameters, mathematics, stages, measurements and exercises."""
