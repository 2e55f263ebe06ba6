"""The digits example on many devices and in many processes."""
