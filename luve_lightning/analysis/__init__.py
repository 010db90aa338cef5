"""Plans of cost, and benchmarks."""
