"""The runtime environment: processor, device, memory, compiled libraries, Python interpreter."""
