"""Studies: one module per figure, each a table and a picture of it."""
