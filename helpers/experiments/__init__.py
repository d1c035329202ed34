"""What chapters share and keep in the artifact store: one file for each kind of experiment."""
