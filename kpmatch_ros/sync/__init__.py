"""What belongs together by time: the images of a pair, their masks and their calibrations."""
