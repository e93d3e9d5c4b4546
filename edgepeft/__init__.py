"""Plan, fine-tune, merge and export models on the hardware you have."""

__version__ = "0.1.0"
