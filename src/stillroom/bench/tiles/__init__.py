"""Coloured patterns in four cells, said in four words."""
