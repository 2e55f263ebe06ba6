"""What batch norm costs, measured: run with `python -m benchmarks…`."""
