"""How the book is built: what depends on what, its steps, and the execution of notebooks."""
