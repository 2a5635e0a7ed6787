"""sayo: the parts that the six scripts stand on. Nothing in here imports a script, tools/ or data/."""
