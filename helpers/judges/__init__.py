"""Judges, offline and by API: how strongly an answer shows a trait, and what became of a request."""
