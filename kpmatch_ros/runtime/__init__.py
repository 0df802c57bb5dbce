"""What this machine and this process have: processor, device, memory, compiled parts, interpreter."""
