"""What every op stands on: choosing, registering and launching kernels, and what an op says of itself."""
