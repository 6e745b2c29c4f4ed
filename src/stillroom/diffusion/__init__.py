"""Processes, denoisers, time laws, samplers: the diffusion core."""
