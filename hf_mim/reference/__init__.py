"""What there is to choose from, read from docstrings and recipes without importing torch: for `hf-mim options`, `hf-mim
recipes`, the completion of the shell and the pages of the documentation."""
