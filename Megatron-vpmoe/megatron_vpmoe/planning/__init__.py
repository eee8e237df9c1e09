"""A training step counted without the machine that it is for: what each GPU would launch, move, send and hold."""
