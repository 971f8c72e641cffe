"""Devices that are not there, simulated; everything here says so in its name."""
