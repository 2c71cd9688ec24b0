"""Steps of the stages played without a device: whether a GPU would take them, and the bytes that they need."""
