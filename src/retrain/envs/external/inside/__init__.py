"""What runs in the fork server's process: the standard library only, and one thread."""
