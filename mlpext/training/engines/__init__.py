"""What runs an epoch."""
