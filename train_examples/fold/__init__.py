"""The trained digits network with its batch norms folded into its convolutions."""
