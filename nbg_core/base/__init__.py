"""Helpers for every other package: ids, files, errors, names, progress, processes, and the base class of settings. They
import no other package of the project."""
