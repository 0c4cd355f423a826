"""What every room uses and what uses none of them: ids, files, errors, names, progress, processes."""
