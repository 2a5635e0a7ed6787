"""Example data: synthetic scenes, preparation scripts for public datasets, and the embedded tiny policy."""
