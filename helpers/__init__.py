"""What the notebooks of the book share, one idea a module; import those (`from helpers.params import ...`)."""
