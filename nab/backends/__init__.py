"""Where real models run. Nothing here is imported by ``import nab``."""
