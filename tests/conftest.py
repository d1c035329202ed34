"""Under test, every helper checks the types and shapes that it states."""

from jaxtyping import install_import_hook

install_import_hook("helpers", "beartype.beartype")
