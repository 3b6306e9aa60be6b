"""What lies below text and training: files that are whole at every moment, and the machine."""
