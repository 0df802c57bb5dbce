"""Synchronises messages by time: the two images of a stereo pair, and images with their masks and calibrations."""
