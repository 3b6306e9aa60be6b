"""What lies below text and training: files that are whole at every moment, the machine, and the hub, which may be
out of reach."""
