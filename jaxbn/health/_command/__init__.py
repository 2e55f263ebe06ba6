"""What `python -m jaxbn.health` is made of."""
