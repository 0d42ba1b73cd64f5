"""Many residual networks of one shape, run as one."""
