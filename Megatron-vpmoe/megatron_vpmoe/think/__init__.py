"""Parts of nano_think: layers of state space models, and what of the design comes after them (docs/nano_think.md)."""
