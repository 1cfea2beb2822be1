"""What a job would need of an accelerator, told on a machine without one."""
