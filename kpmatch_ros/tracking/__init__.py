"""Points that are followed from frame to frame."""
