"""How a model's blocks can be restored, measured: `abyssal.inspect`."""
