"""Plan, fine-tune, merge and export models on the hardware you have."""

import logging

__version__ = "0.1.0"

# On some CPUs bitsandbytes recommends, on every import, a kernel for inference that edgepeft never uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
