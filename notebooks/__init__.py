"""The notebooks as Python files in percent format, the .ipynb files made from them, and their helpers."""
