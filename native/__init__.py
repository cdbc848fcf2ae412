"""The service without containers: its servers and scripts as child processes."""
