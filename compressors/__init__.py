"""What a delta is: how to make, check and apply one."""
