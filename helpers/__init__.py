"""What the notebooks of the book share, one idea a module: `from helpers.params import ...`."""
