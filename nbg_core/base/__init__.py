"""Helpers that every other package uses, and that import none of them: ids, files, errors, names, progress, processes,
and the base class of settings."""
