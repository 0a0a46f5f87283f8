"""From run folders to a table, figures and a page (`python -m mpifed report`). Imports neither engine nor torch."""
