"""Examples that train networks with `jaxbn`; each folder has a README with measured results."""
