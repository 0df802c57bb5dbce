"""Programs that measure this package, and what it is compared with."""
